"""Directories of models: where one is found, what of it is copied, and how a new one appears, whole or not at all."""

import contextlib
import fnmatch
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from lm_jax.checkpoints import buckets as storage
from lm_jax.distributed.processes import at_work
from lm_jax.errors import UserError

GGUF = ".gguf"
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "README.md"]
HUB_IGNORED = ["consolidated*", "*/*.safetensors"]  # other formats of the same weights
COPIED_DIRS = ("additional_chat_templates",)
_MAKES_WHOLE = ("config.json", "adapter_config.json")


def resolve_model_dir(model: str) -> Path:
    """The local directory or GGUF file of a model: `model` itself, or what was downloaded of that hub id or address.

    Args:
      model: also `org/name/FILE.gguf`, a file of that hub id.

    Raises:
      UserError: neither a directory, a GGUF file nor a hub id or address that can be downloaded.
    """
    if storage.is_remote(model):
        return _from_bucket(model.rstrip("/"))
    path = Path(model)
    if model and (path.is_dir() or (path.suffix == GGUF and path.is_file())):
        return path
    hub = re.fullmatch(rf"([\w-][\w.-]*/[\w-][\w.-]*?)(/.+{GGUF})?", model)
    if not hub or hub[1].endswith(GGUF):
        raise UserError(
            f"model {model!r}: no such directory or {GGUF} file; give one, or a hub id such as Qwen/Qwen3-0.6B"
        )
    try:
        if hub[2]:
            found = Path(snapshot_download(hub[1], allow_patterns=[_all_parts(hub[2][1:])]), hub[2][1:])
            if not found.is_file():
                raise UserError(f"model {model!r}: {hub[1]} has no such file; check the spelling")
            return found
        return Path(snapshot_download(hub[1], allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model {model!r}: no such directory, and no such hub id can be downloaded ({reason}); "
            "check the spelling, the network, and HF_TOKEN for gated models"
        ) from error


def _all_parts(name: str) -> str:
    """A pattern of all files that a model is split into, by the name of one."""
    return re.sub(rf"-\d{{5}}-of-(\d{{5}}){GGUF}$", rf"-*-of-\1{GGUF}", name)


def holds_model(path: Path) -> bool:
    """Whether a model, an adapter or a run seems to be there."""
    return path.is_file() or any((path / name).is_file() for name in _MAKES_WHOLE)


def _from_bucket(model: str) -> Path:
    with at_work():
        if model.endswith(GGUF):
            parent, _, name = model.rpartition("/")
            parts = {n: v for n, v in storage.find(parent).items() if fnmatch.fnmatchcase(n, _all_parts(name))}
            if name not in parts:
                raise UserError(f"model {model}: no such object; check the address")
            return storage.cached(parent, parts) / name
        found = storage.find(model)
        if not found.keys() & set(_MAKES_WHOLE):
            raise UserError(f"model {model}: no config.json there; give a model's or a run's directory in a bucket")
        wanted = [
            name
            for name in found
            if name in COPIED_FILES
            or name.startswith(tuple(f"{d}/" for d in COPIED_DIRS))
            or re.fullmatch(r"(adapter_)?config\.json|README\.md|[^/]*\.safetensors(\.index\.json)?", name)
        ]
        return storage.cached(model, {name: found[name] for name in wanted})


_made: list[tempfile.TemporaryDirectory] = []  # gone when the process ends


def made_directory(name: str) -> Path:
    """A new directory of that name, for what this process derives from a model's files; it goes with the process."""
    _made.append(tempfile.TemporaryDirectory(prefix="lm_jax-"))
    path = Path(_made[-1].name, name)
    path.mkdir()
    return path


def directory_with_tokenizer(adapter_dir: Path, base_dir: str) -> str:
    """A directory with the base's config.json and the adapter's tokenizer, if it brings one; else the base's own."""
    if not any((adapter_dir / name).exists() for name in _TOKENIZER_FILES):
        return base_dir
    made = made_directory(adapter_dir.name)
    copy_side_files(adapter_dir, made)
    for name in ("config.json", "generation_config.json", "README.md"):
        if (Path(base_dir) / name).is_file() and not (made / name).exists():
            shutil.copyfile(Path(base_dir) / name, made / name)
    return str(made)


_OCCUPIED = "output {}: exists and is not empty; choose another directory or remove it"


def check_output(output_dir: str | Path) -> None:
    """Raises UserError where `export_hf` would refuse the output, for callers that load a large model first."""
    if _occupied(output_dir):
        raise UserError(_OCCUPIED.format(output_dir))


def _occupied(output_dir: str | Path) -> bool:
    if storage.is_remote(output_dir):
        storage.check_bucket(str(output_dir))
        return storage.exists(str(output_dir))
    output = Path(output_dir)
    return output.exists() and not (output.is_dir() and not any(output.iterdir()))


@contextlib.contextmanager
def appears_whole(output_dir: str | Path) -> Iterator[Path]:
    """A sibling directory to write into, renamed to `output_dir` at the end and removed on an error.

    Of an address: a temporary one, uploaded at the end. A bucket has no directories that could be renamed: the files
    without which nothing loads come last, and on an error all go.

    Raises:
      UserError: safetensors could not write, which it says in an error of its own; a bucket refused.
    """
    if storage.is_remote(output_dir):
        with tempfile.TemporaryDirectory() as directory:
            local = Path(directory, "export")
            with appears_whole(local) as partial:
                yield partial
            _upload(local, str(output_dir).rstrip("/"))
        return
    output = Path(output_dir)
    partial = output.absolute().parent / f".{output.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed export left
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        os.rename(partial, output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):
            cure = "nothing is left there: see that there is room, then export again"
            raise UserError(f"{output}: {error}; {cure}") from error
        raise


def _upload(directory: Path, address: str) -> None:
    names = [str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()]
    last = [name for name in names if name in _MAKES_WHOLE]
    try:
        for part in ([name for name in names if name not in last], last):
            storage.upload(directory, part, address)
    except BaseException:
        with contextlib.suppress(UserError):  # what refused may refuse this too
            storage.remove(f"{address}/{name}" for name in [*last, *names])
        raise


def copy_side_files(source_dir: str | Path | None, target: Path) -> None:
    """Copies tokenizer, chat templates and generation config into the directory `target`; not config.json."""
    if source_dir is None:
        return
    for name in COPIED_FILES:
        if (Path(source_dir) / name).is_file():
            shutil.copyfile(Path(source_dir) / name, target / name)
    for name in COPIED_DIRS:
        if (Path(source_dir) / name).is_dir():
            shutil.copytree(Path(source_dir) / name, target / name)


def write_card(card: str | None, target: Path) -> None:
    """Writes the model card, where there is one, into the directory `target`."""
    if card is not None:
        (target / "README.md").write_text(card, encoding="utf-8")
