"""A configuration is copied to every place its run is shown, so no secret may stand in it."""

from pipeline.config.tree import Mistake, Node
from pipeline.redact import has_credentials


def credentials_in(node: Node, key: str = "") -> list[Mistake]:
    """Every value that is an address with a password or a signature in it."""
    found = [
        mistake
        for name, child in node.children()
        for mistake in credentials_in(child, f"{key}.{name}" if key else name)
    ]
    if not node.children() and has_credentials(str(node.value)):
        problem = (
            "expected an address without password or signature, since the configuration is copied "
            "to every place the run is shown; give them by the library's environment variables or "
            "credential files (AWS_…, ~/.pgpass, MLFLOW_TRACKING_…)"
        )
        found.append(Mistake(origin=node.origin, key=key, problem=problem))
    return found
