"""Files whose bits flip, or that were cut short."""

import random
import shutil
from pathlib import Path

from tests.e2e.common import Fork, arguments
from tests.faults.bench import Bench, contents
from tests.multi_process.common import assert_same, copy_run, newest


def damaged_checkpoint(bench: Bench, number: int) -> str:
    whole, rng = bench.undisturbed(), bench.rng
    output = copy_run(whole, bench.training.directory / f"damaged_{number}")
    step, _ = newest(output)
    files = [p for p in (output / "checkpoints" / str(step)).rglob("*") if p.is_file() and p.stat().st_size]
    file = rng.choice([p for p in files if not p.name.startswith("checksums")])
    how = _damage(file, rng)
    done = bench.training.start(output.name, 2, 1).ok()
    said = "".join(d.stderr for d in done.values())
    assert f"checkpoints/{step}: damaged" in said and file.name in said, said[-2000:]
    assert_same(output, whole)
    return f"{how} in {file.relative_to(output)}"


def damaged_safetensors(bench: Bench, number: int) -> str:
    model = Path(shutil.copytree(bench.rows.model, bench.directory / f"model_{number}"))
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: bench.rng.randrange(1, file.stat().st_size)])
    flags = [f"model={model}", *dict(bench.rows.flags(bench.directory / f"out_{number}"))["score"][1:]]
    line = Fork("score", *arguments("score", *flags), devices=2).wait().error()
    assert str(model) in line, line
    return "cut short"


def _damage(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    if rng.random() < 0.3:
        file.write_bytes(content[:at])
        return "truncated"
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"bit of byte {at} flipped"


def damaged_store(bench: Bench, number: int) -> str:
    """Weights that training reads: a flipped bit, or a file that was cut short."""
    whole, rng = bench.written("musc_token_weights"), bench.rng
    out = Path(shutil.copytree(whole, bench.directory / f"store_{number}"))
    rows = out / "weighed.jsonl"
    rows.write_text(rows.read_text().replace(str(whole), str(out)))
    files = [p for p in (out / "weighed.weights").rglob("*") if p.is_file() and p.stat().st_size and p.name[0] != "."]
    file = rng.choice(files)
    how = _damage(file, rng)
    flags = [f"model={bench.rows.model}", f"input={rows}", f"output={out}/run", "weights=store:calibrated_entropy"]
    flags += ["max_length=64", "max_steps=1"]
    done = Fork("musc_train", *arguments("musc_train", *flags, preset="tiny")).wait()
    line = done.error(noise=True)
    assert "weighed.weights" in line, (how, file, line)
    assert not (out / "run/metrics.jsonl").exists()
    return f"{how} in {file.relative_to(out)}: {line[-100:]}"


def damaged_journal(bench: Bench, number: int) -> str:
    """Rows of a command that was killed before its end: what is damaged is done again, and nothing of it is kept."""
    whole, rng = bench.written("generate"), bench.rng
    out = bench.directory / f"journal_{number}"
    partial, group = out / "texts.jsonl.partial", bench.command("generate", out)
    group.until(lambda: partial.exists() and partial.read_bytes().count(b"\n") > 2)
    for member in group.members.values():
        member.process.kill()
    group.wait()
    if not partial.exists():
        return "not tried: it had ended before the kill"
    how = _damage(partial, rng)
    told = "".join(done.stderr for done in bench.command("generate", out).ok().values())
    assert contents(out) == contents(whole)
    return f"{how}: {next((line for line in told.splitlines() if 'damaged' in line), 'nothing said')[:100]}"


def damaged_rows(bench: Bench, number: int) -> str:
    """Rows that were cut short within a line; a flipped bit in a text is another text, and nobody can know."""
    rng, content = bench.rng, Path(bench.rows.pairs).read_bytes()
    ends = {at for at, byte in enumerate(content) if byte == 10}
    at = rng.choice([at for at in range(1, len(content)) if not {at, at - 1} & ends])
    rows = bench.directory / f"rows_{number}.jsonl"
    rows.write_bytes(content[:at])
    flags = [f"model={bench.rows.model}", f"input={rows}", f"output={bench.directory}/never_{number}"]
    line = Fork("musc_train", *arguments("musc_train", *flags, preset="tiny")).wait().error()
    assert rows.name in line, line
    return f"cut at byte {at}: {line[-100:]}"
