"""Open a model and its tokenizer from a folder, a GGUF file or a Hub id; refuse early, in one line."""

import copy
import json
import math
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mla.config import MLAConfig
from mla.errors import MLAError
from mla.formats import cache_format
from mla.integrations.gguf_rope import restore_scaling
from mla.machine import free_memory
from mla.ops.latent import FORMAT_DTYPES
from mla.reading import is_hub_id, local_path

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

GIB = 2**30
# What mla.formats, which knows no torch, calls the dtype of a cache.
DTYPE_FORMATS = {dtype: name for name, dtype in FORMAT_DTYPES.items()}
# Weights that a language model may leave aside, beside those that its own class names: drafters, and the
# towers of other media.
_ASIDE = re.compile(r"(^|\.)(mtp|vision_tower|vision_model|visual|audio_tower|\w*projector)\b")


def load_model(source: str, *, dtype: DtypeName = "auto", device: str = "cpu") -> Any:
    """The causal language model of ``source``, in eval mode, by stock classes and without remote code.

    Args:
        source: a folder with config.json and safetensors, a .gguf file, or a Hub id ("namespace/name").
        dtype: "auto" keeps the checkpoint's dtype, except on a CPU with memory to spare: there float16, and
            bfloat16 where the CPU has no such arithmetic, become float32, which is several times faster.
        device: any torch device.

    Raises:
        MLAError: nothing there, not a model, damaged weights, a family this Transformers does not know, no
            such device here, less memory than the weights need, or a GGUF file whose RoPE scaling would be
            lost.
    """
    _check_device(device)
    path, options = _locate(source)
    config = load_config(source)
    size = _size(source, config)
    chosen = _choose_dtype(dtype, config, device, size)
    if device == "cpu" and size is not None:
        needed = size.nbytes if chosen == "auto" else size.numbers * chosen.itemsize
        require_memory(needed, f"the weights of {source}")
    options |= {"config": config, "dtype": chosen}
    # Transformers' own error for shapes that do not fit names none of them.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = _load(AutoModelForCausalLM, path, options)
    _check_complete(source, found["missing_keys"], found["mismatched_keys"])
    _check_used(source, config, found["unexpected_keys"])
    return model.to(device).eval()


def load_config(source: str) -> Any:
    """The Transformers configuration of ``source``; arguments and errors as for :func:`load_model`."""
    path, options = _locate(source)
    config = _load(AutoConfig, path, options)
    if "gguf_file" in options:
        restore_scaling(Path(path, options["gguf_file"]), config)
    return config


def load_mla_config(source: str, *, max_model_len: int | None = None) -> tuple[Any, MLAConfig]:
    """The configuration of an MLA model, as Transformers and as we read it; refused before weights are read.

    Args:
        source: as for :func:`load_model`.
        max_model_len: a limit on prompt plus answer that the model has to allow.

    Raises:
        MLAError: as for :func:`load_model`; the model is not MLA, or does not go up to that limit.
    """
    stored = load_config(source)
    config = MLAConfig.from_transformers(stored)
    longest = config.max_position_embeddings
    if max_model_len is not None and not 1 <= max_model_len <= longest:
        raise MLAError(f"--max-model-len: expected 1 to {longest}, got {max_model_len}")
    return stored, config


def load_mla_model(
    source: str,
    *,
    dtype: DtypeName,
    cache_format: str,
    device: str = "cpu",
    max_model_len: int | None = None,
) -> tuple[Any, MLAConfig, str]:
    """An MLA model, not absorbed yet, its dimensions, and the format of its caches.

    Args:
        source, dtype, device: as for :func:`load_model`.
        cache_format: as for :func:`choose_cache_format`.
        max_model_len: as for :func:`load_mla_config`.

    Raises:
        MLAError: as for these three.
    """
    stored, config = load_mla_config(source, max_model_len=max_model_len)
    choose_cache_format(cache_format, stored, torch.float32)  # an unknown one, before the weights are read
    model = load_model(source, dtype=dtype, device=device)
    computed = model.get_input_embeddings().weight.dtype
    return model, config, choose_cache_format(cache_format, stored, computed)


def settle_auto(source: str, config: Any) -> tuple[DtypeName, str]:
    """What "auto" is for ``source`` on this CPU, by :func:`load_model` and :func:`choose_cache_format`.

    The dtype and the cache format of a model that is computed in float32, because it is stored so or because
    the checkpoint's own dtype is not computed in; else ("auto", "auto"). vLLM would take bf16 for the first.
    """
    # Quantised weights are computed in what their kernels know.
    if not _is_quantised(config):
        chosen = _choose_dtype("auto", config, "cpu", _size(source, config))
        if torch.float32 in (_stored_dtype(config), chosen):
            return "float32", choose_cache_format("auto", config, torch.float32)
    return "auto", "auto"


def weight_bytes(source: str, config: Any, dtype: DtypeName) -> int:
    """Bytes of the weights, in ``dtype`` or as they are stored for "auto"; 0 where nobody knows."""
    size = _size(source, config)
    if size is None:
        return 0
    return size.nbytes if dtype == "auto" else size.numbers * getattr(torch, dtype).itemsize


def load_tokenizer(source: str) -> Any:
    """The tokenizer that lies with ``source``; arguments and errors as for :func:`load_model`."""
    path, options = _locate(source)
    return _load(AutoTokenizer, path, options)


def choose_cache_format(name: str, config: Any, dtype: torch.dtype) -> str:
    """The cache format that ``name`` means for a model stored as ``config`` says and computing in ``dtype``.

    "auto" is bf16 for a checkpoint in bf16, whatever it is computed in: its latents were rounded to bf16 in
    training. Else it is the dtype of the computation.

    Raises:
        MLAError: an unknown format; the known ones are named.
    """
    if name == "auto":
        stored = _stored_dtype(config)
        return "bf16" if stored == torch.bfloat16 else DTYPE_FORMATS.get(dtype, "fp32")
    cache_format(name)
    return name


def require_memory(needed: int, purpose: str) -> None:
    """Refuse before allocating what the machine does not have.

    Raises:
        MLAError: ``needed`` bytes are more than what is available now; both are named.
    """
    available = free_memory()
    if needed > available:
        raise MLAError(
            f"{purpose} would need {needed / GIB:.2f} GiB of memory, {available / GIB:.2f} GiB are available"
        )


def computes_in_half(device: str) -> bool:
    """Whether bf16 products run natively there; CPUs without such instructions emulate them slowly.

    oneDNN calls every AVX-512 processor able: without BF16 or AMX it takes five times as long as for fp32.
    """
    if device != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    # torch for Apple's processors has no oneDNN, and no operator that asks it.
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` wants: a folder or id, and further options."""
    path = local_path(source)
    if path is not None and path.is_file():
        if path.suffix != ".gguf":
            raise MLAError(f"{source}: expected a folder, a .gguf file or a Hub id, got another file")
        return str(path.parent), {"gguf_file": path.name}
    if path is not None and path.is_dir():
        if not (path / "config.json").is_file():
            raise MLAError(f"{source}: expected a model folder with a config.json, got a folder without one")
        return str(path), {}
    if not is_hub_id(source):
        raise MLAError(f"{source}: no such folder or file, and not a Hub id (namespace/name)")
    return source, {}


def _check_device(device: str) -> None:
    """Before minutes go into loading: torch says only on first use what it was not built for."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MLAError(f"--device {device}: this torch cannot use it here: {_first_line(error)}") from error


def _load(cls: Any, path: str, options: dict[str, Any]) -> Any:
    try:
        return cls.from_pretrained(path, trust_remote_code=False, **options)
    except ImportError as error:  # of packages that read GGUF files or quantised weights
        if "gguf_file" in options:
            raise MLAError(
                "reading a .gguf file needs gguf and accelerate: pip install gguf accelerate"
            ) from error
        raise MLAError(f"{path} needs a package that is not installed: {_first_line(error)}") from error
    except StrictDataclassError as error:  # a configuration with a wrong type, or that contradicts itself
        raise MLAError(f"{path} does not open: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise MLAError(f"{path} does not open: {_first_line(error)}") from error


def _check_complete(source: str, missing: Iterable[str], misfits: Iterable[tuple[str, Any, Any]]) -> None:
    """Transformers draws weights that are missing at random, and says so in a warning."""
    for name, stored, wanted in sorted(misfits):
        raise MLAError(
            f"{source} does not open: {name} is {list(stored)}, its config.json makes it {list(wanted)}"
        )
    names = sorted(missing)
    if names:
        why = "a file is missing, or it is no language model"
        if source.endswith(".gguf"):
            why = "the parts of a split file must be merged first, by llama-gguf-split --merge"
        raise MLAError(f"{source} lacks {_some(names)} of the model: {why}")


def _check_used(source: str, config: Any, unused: Iterable[str]) -> None:
    """Weights that nothing reads make another model than the one that was trained."""
    if _is_quantised(config):  # its scales have names of its own
        return
    text = config.get_text_config(decoder=True)
    first = text.num_hidden_layers
    drafters = range(first, first + (getattr(text, "num_nextn_predict_layers", None) or 0))
    numbers = "|".join(map(str, drafters)) or "none"
    drafter = re.compile(rf"(^|\.)layers\.({numbers})\.")
    names = sorted(name for name in unused if not _ASIDE.search(name) and not drafter.search(name))
    if names:
        raise MLAError(
            f"{source} holds {_some(names)} that a {text.model_type} model of its config.json would not use: "
            "another architecture, or a config.json that says less than there is"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({shown})"


class _Size(NamedTuple):
    """Of a model's weights: how many numbers they are, and their bytes as they are stored."""

    numbers: int
    nbytes: int


def _size(source: str, config: Any) -> _Size | None:
    """The size of a model's weights, None where nobody knows.

    From the headers of a folder's safetensors; of a GGUF file, whose weights become plain ones, and of a Hub
    id, whose files may not be here yet, from the shapes that the configuration makes.

    Raises:
        MLAError: a file is truncated or not safetensors.
    """
    folder = local_path(source)
    if folder is None or folder.is_file():
        if _is_quantised(config) and folder is None:
            return None
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        except ValueError:  # no language model: opening it says so
            return None
        numbers = sum(each.numel() for each in model.parameters())
        return _Size(numbers, numbers * (_stored_dtype(config) or torch.float32).itemsize)
    numbers, nbytes = 0, 0
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping
                    numbers += math.prod(weights.get_slice(name).get_shape())
        except SafetensorError as error:
            raise MLAError(f"{file} is damaged: {_first_line(error)}; fetch or convert it again") from error
        nbytes += file.stat().st_size
    return _Size(numbers, nbytes) if numbers else None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder that Transformers reads: the weights may lie there in another form, too."""
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # none, or opening the model says so
        names = {"model.safetensors"}
    files = [folder / str(name) for name in sorted(names)]
    return [file for file in files if file.is_file()]


def _is_quantised(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _stored_dtype(config: Any) -> torch.dtype | None:
    """What a config says that its checkpoint is stored in, None where it says nothing."""
    stored: torch.dtype | None = getattr(config.get_text_config(decoder=True), "dtype", None)
    return stored


def _choose_dtype(
    dtype: DtypeName, config: Any, device: str, size: _Size | None
) -> torch.dtype | Literal["auto"]:
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    stored = _stored_dtype(config)
    # No CPU kernel of ours takes float16.
    slow = stored == torch.float16 or (stored == torch.bfloat16 and not computes_in_half(device))
    if device == "cpu" and slow and size is not None and size.numbers * 4 < free_memory() // 2:
        return torch.float32
    return "auto"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
