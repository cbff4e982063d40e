"""Small networks in the layouts of others, for the tests of import and export."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.models.predictor import Predictor, PredictorConfig

# Heads of an even width of at least 12; nothing here has the numbers of a named size.
ENCODER = EncoderConfig(width=48, depth=3, heads=2, mlp_hidden=176, patch_size=8)
PREDICTOR = PredictorConfig(width=36, depth=2, heads=3, num_mask_tokens=10)
FRAMES, RESOLUTION = 8, 32
HEADS = ["--heads", "2", "--predictor-heads", "3"]
CLIP = ["--frames", str(FRAMES), "--resolution", str(RESOLUTION)]


def networks(
    seed: int = 0, encoder: EncoderConfig = ENCODER, predictor: PredictorConfig = PREDICTOR
) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of student, teacher and predictor by our names; no two tensors are alike."""
    torch.manual_seed(seed)
    attention = AttentionConfig()
    modules = {
        "encoder": Encoder(encoder, attention=attention),
        "teacher": Encoder(encoder, attention=attention),
        "predictor": Predictor(predictor, encoder_width=encoder.dims.width, attention=attention),
    }
    return {
        name: {key: value + 0.05 * torch.randn_like(value) for key, value in m.state_dict().items()}
        for name, m in modules.items()
    }


def official(parts: dict[str, dict[str, torch.Tensor]], *, table: bool = True) -> dict:
    """The same as the official trainer saves it, optimiser's state and all."""
    content = {
        "encoder": _wrapped(parts["encoder"]),
        "target_encoder": _wrapped(parts["teacher"]),
        "predictor": _wrapped(parts["predictor"]),
        "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "scaler": None,
        "epoch": 7,
        "loss": 0.5,
        "batch_size": 2,
        "world_size": 1,
        "lr": 1e-3,
    }
    if table:  # released files carry tables that rotary positions do not use
        for key in ("encoder", "target_encoder"):
            content[key]["module.backbone.pos_embed"] = torch.zeros(1, 64, 48)
    return content


def write_official(path: Path, parts: dict | None = None, **changes) -> Path:
    torch.save({**official(parts or networks()), **changes}, path)
    return path


def hf_state(parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Student and predictor by transformers' names, written down here a second time."""
    state = {}
    for network, tensors in (("encoder", parts["encoder"]), ("predictor", parts["predictor"])):
        for name, tensor in tensors.items():
            state.update(_hf_entries(network, name, tensor))
    return state


def write_tiny(folder: Path, **changes) -> dict[str, dict[str, torch.Tensor]]:
    """FOLDER/official.pt with networks of the size of `tests.plain.tiny_config`; its weights."""
    parts = networks(
        seed=5,
        encoder=EncoderConfig(size="vit_tiny", width=48, depth=2, heads=2, patch_size=8),
        predictor=PredictorConfig(width=24, depth=1, heads=2),
    )
    write_official(folder / "official.pt", parts, **changes)
    return parts


def write_hf(folder: Path, parts: dict | None = None, *, shards: int = 1, **config) -> Path:
    folder.mkdir(parents=True)
    state = {name: t.contiguous().clone() for name, t in hf_state(parts or networks()).items()}
    settings = {
        "model_type": "vjepa2",
        "architectures": ["VJEPA2Model"],
        "patch_size": 8,
        "tubelet_size": 2,
        "crop_size": RESOLUTION,
        "frames_per_clip": FRAMES,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "mlp_ratio": 176 / 48,
        "pred_hidden_size": 36,
        "pred_num_hidden_layers": 2,
        "pred_num_attention_heads": 3,
        "pred_num_mask_tokens": 10,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    home = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[number::shards])
        save_file(part, folder / name, {"format": "pt"})
        home.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 0}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _wrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in state.items():
        if name == "mask_tokens":
            for number, token in enumerate(tensor):
                tensors[f"module.backbone.mask_tokens.{number}"] = token.clone()
        else:
            tensors[f"module.backbone.{name}"] = tensor
    return tensors


def _hf_entries(network: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if name == "mask_tokens":
        return {"predictor.embeddings.mask_tokens": tensor}
    for old, new in (
        ("patch_embed.proj.", "embeddings.patch_embeddings.proj."),
        ("predictor_embed.", "embeddings.predictor_embeddings."),
        ("predictor_norm.", "layernorm."),
        ("predictor_proj.", "proj."),
        ("predictor_blocks.", "layer."),
        ("blocks.", "layer."),
    ):
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    else:
        name = name.replace("norm.", "layernorm.", 1)
    if ".attn.qkv." in name:
        head, _, leaf = name.partition(".attn.qkv.")
        words = ("query", "key", "value")
        return {
            f"{network}.{head}.attention.{word}.{leaf}": third
            for word, third in zip(words, tensor.chunk(3), strict=True)
        }
    return {f"{network}.{name.replace('.attn.', '.attention.')}": tensor}
