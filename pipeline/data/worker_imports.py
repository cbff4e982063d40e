"""Everything a loader worker imports; the fork server imports it once for all workers."""

import warnings

# From torch on machines with DeepSpeed; the training process prints it, workers need not repeat it.
warnings.filterwarnings("ignore", message="The pynvml package", category=FutureWarning)

import webdataset.utils  # noqa: E402

from pipeline.data import augment, stream  # noqa: E402, F401 - after the filter

augment.transforms()

# No pickles and no shell commands in URLs in a worker, whatever WDS_SECURE says.
webdataset.utils.enforce_security = True  # pyright: ignore[reportAttributeAccessIssue]
