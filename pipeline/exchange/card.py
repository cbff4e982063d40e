"""The model card of an export: README.md with the front matter that model hubs read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.exchange.difference import Difference
from pipeline.exchange.layout import Networks
from pipeline.exchange.training import last_name

CARD_FILE = "README.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """What the card tells."""

    name: str
    networks: Networks
    weights: str
    format: str
    license: str | None
    difference: Difference | None
    checked: bool
    """Whether a comparison with transformers was asked for."""
    provenance: Mapping[str, Any]
    notes: Sequence[str]
    training: Mapping[str, Any] | None


def card(facts: CardFacts) -> str:
    """The text of README.md."""
    parts = [
        _front_matter(facts),
        f"# {' '.join(facts.name.split())}\n",
        _model(facts),
        _use(facts),
        _training(facts),
        _probes(facts),
        _parity(facts),
        _origin(facts),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: CardFacts) -> str:
    training = facts.training or {}
    front: dict[str, Any] = {
        **({"library_name": "transformers"} if facts.format == "hf" else {}),
        "pipeline_tag": "feature-extraction",
        **({"license": facts.license} if facts.license else {}),
        "tags": ["video", "v-jepa2", "self-supervised"],
    }
    names = [str(source["name"]) for source in training.get("sources", [])]
    if names:
        front["datasets"] = names
    # JSON is YAML, and quotes whatever a name may hold.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]
    return "\n".join(["---", *lines, "---", ""])


def _model(facts: CardFacts) -> str:
    networks = facts.networks
    dims, predictor = networks.encoder.dims, networks.predictor
    rows = [
        ("encoder", _size(dims.width, dims.depth, dims.heads, dims.mlp_hidden)),
        ("token", f"{networks.encoder.tubelet_size} frames × {networks.encoder.patch_size}² px"),
        ("positions", _positions(networks)),
        ("clips", f"{networks.frames or 'any'} frames, {networks.resolution or 'any'} px"),
        ("weights", _weights(networks.encoder_is)),
    ]
    if predictor is not None:
        narrow = predictor.dims
        text = _size(narrow.width, narrow.depth, narrow.heads, narrow.mlp_hidden)
        rows.insert(1, ("predictor", f"{text}, {predictor.num_mask_tokens} mask tokens"))
    return (
        "Self-supervised video encoder of the V-JEPA 2 kind (arXiv 2506.09985)"
        + (", with its predictor" if predictor is not None else "")
        + ".\n\n"
        + _table(("", ""), rows)
    )


def _use(facts: CardFacts) -> str:
    name = json.dumps(facts.name, ensure_ascii=False)
    if facts.format == "hf":
        code = (
            "from transformers import AutoModel, AutoVideoProcessor\n\n"
            f"model = AutoModel.from_pretrained({name})\n"
            f"processor = AutoVideoProcessor.from_pretrained({name})\n"
            'inputs = processor(frames_TCHW, return_tensors="pt")\n'
            "features = model(**inputs, skip_predictor=True).last_hidden_state"
        )
        warning = (
            f"\nPositions are laid out for {facts.networks.resolution} px: transformers computes "
            "wrong ones for any other size, jepa does not. A clip may be of any length.\n"
        )
        if facts.networks.predictor is not None and facts.networks.predictor.num_mask_tokens > 1:
            warning += (
                "\nIts predictor always asks with the second mask token; a training with clips of "
                "one length has used the first alone.\n"
            )
    elif facts.format == "safetensors":
        code = f"from pipeline.exchange import load_encoder\n\nencoder = load_encoder({name})"
        warning = ""
    else:
        keys = ["encoder", "target_encoder", *(["predictor"] if facts.networks.predictor else [])]
        return f"## Use\n\nAn official checkpoint file: `{'`, `'.join(keys)}`.\n"
    return f"## Use\n\n```python\n{code}\n```\n{warning}"


def _training(facts: CardFacts) -> str:
    told = facts.training
    if told is None:
        return "## Training\n\nNot trained by jepa, or without its records: see the origin below.\n"
    stages = [
        (
            stage["name"],
            stage["frames"],
            f"{stage['fps']:g}",
            f"{stage['resolution']} px",
            f"{stage['steps']:,} of {stage['of_steps']:,}",
            f"{stage['peak_learning_rate']:g}",
        )
        for stage in told["stages"]
    ]
    headings = ("stage", "frames", "fps", "size", "steps", "peak learning rate")
    sources = [
        (
            source["name"],
            _number(source.get("samples")),
            _number(source.get("weight")),
            f"`{str(source.get('digest', 'not known'))[:16]}`",
        )
        for source in told["sources"]
    ]
    return (
        f"## Training\n\nStep {told['step']:,} of {told['num_steps']:,}; global batch "
        f"{told['global_batch']:,} clips; {told['clips_seen']:,} clips and "
        f"{told['tokens_seen']:,} tokens seen; {told['precision']}, averages in fp32; code "
        f"{_code(told)}.{_base(told.get('base_model'))}\n\n"
        + _table(headings, stages)
        + "\n### Data\n\n"
        + _table(("dataset", "samples", "weight", "digest"), sources)
    )


def _probes(facts: CardFacts) -> str:
    probes = [
        (
            probe["task"],
            probe["head"],
            probe["which"],
            f"{100 * probe['top1']:.1f} %",
            _percent(probe.get("chance")),
            probe["seeds"],
            _number(probe.get("num_val")),
            _protocol(probe.get("clip", {})),
        )
        for probe in (facts.training or {}).get("probes", [])
    ]
    if not probes:
        return "## Probes\n\nNone was run on this checkpoint.\n"
    headings = ("task", "head", "encoder", "top-1", "chance", "seeds", "clips", "protocol")
    return "## Probes\n\nFrozen encoder, small heads.\n\n" + _table(headings, probes)


def _parity(facts: CardFacts) -> str:
    if facts.format != "hf":
        return ""
    difference = facts.difference
    if difference is not None:
        told = (
            f"Loaded strictly by transformers {difference.transformers}; largest difference from "
            f"jepa's own outputs, fp32, on one random clip: encoder {difference.encoder:.2e}, "
            f"predictor {difference.predictor:.2e}."
        )
    elif facts.checked:
        told = "Not measured: transformers 5 or newer was not installed where this was exported."
    else:
        told = "Not measured: the export was asked not to."
    return f"## Numeric difference\n\n{told}\n"


def _origin(facts: CardFacts) -> str:
    hidden = ("training", "notes", "files")
    rows = [
        (key, f"`{last_name(value) if key in ('source', 'exchange') else value}`")
        for key, value in facts.provenance.items()
        if key not in hidden
    ]
    notes = "".join(f"- {note}\n" for note in facts.notes)
    return "## Origin\n\n" + _table(("", ""), rows) + (f"\n{notes}" if notes else "")


def _positions(networks: Networks) -> str:
    if networks.attention.positions == "sincos":
        return "fixed table of sines and cosines, added to the tokens"
    return f"3-D rotary, {networks.attention.rope}"


def _base(base: Mapping[str, Any] | None) -> str:
    # Not in the front matter: model hubs read a name of their own there, and refuse a path.
    if not base:
        return ""
    digest = f", digest `{str(base['digest'])[:16]}`" if base.get("digest") else ""
    return (
        f" Started from the weights of `{last_name(base['source'])}` ({base['format']}{digest}); "
        f"the teacher was {base['teacher']}."
    )


def _code(told: Mapping[str, Any]) -> str:
    commits = [str(commit) for commit in told.get("code", []) if commit]
    return f"`{commits[-1]}`" if commits else "of a version that was not recorded"


def _weights(role: str) -> str:
    words = {
        "teacher": "the teacher's moving average, as the published evaluations use",
        "student": "the student's, as the optimiser left them",
    }
    return words.get(role, "the source does not say whether they are averaged")


def _size(width: int, depth: int, heads: int, hidden: int) -> str:
    return f"width {width}, {depth} blocks, {heads} heads, MLP {hidden}"


def _protocol(clip: Mapping[str, Any]) -> str:
    if not clip:
        return "–"
    return (
        f"{clip.get('frames')} frames × {clip.get('segments')} segments × {clip.get('views')} "
        f"views, {clip.get('resolution')} px"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [_row(headings), _row(["---"] * len(headings)), *(_row(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[Any]) -> str:
    # A bar or a line break in a name would make another cell of it.
    words = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return "| " + " | ".join(words) + " |"
