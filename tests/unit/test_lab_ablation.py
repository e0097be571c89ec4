"""The ablation's loop around arms that only note what they were asked, and the report of made results."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from configs.lab_ablation import get_config
from lab import ablation as lab_ablation
from lab import steps as lab_steps
from lab.ablation import LabAblationConfig, ablate, best_rate, own_cores
from lab.arms import Learnt
from lab.commands import logged, run_step
from lab.table import Method, markdown, plot_method, report_of
from lab.worlds.gate import GATED
from lm_jax.config import from_config_dict
from lm_jax.data.rows import write_jsonl
from lm_jax.errors import UserError

ASKED = "list tools. use exactly two words. start with saw."
RIGHT, WRONG = "saw, axe", "axe, saw"
SHOW_CORES = "import json, os; print(json.dumps(sorted(os.sched_getaffinity(0))))"


class Fake:
    """Stands in for `MuscArms`: a model's name says how many of ten answers it gets right."""

    right = {"seed/model": 2, "dpo@0.0001": 4, "dpo@0.0003": 6, "kl@0.0001": 7, "kl@0.0003": 7}
    calls: list = []
    gate = 0.95

    def __init__(self, config, world, seed, root, names):
        self.about = {name: name for name in ("seed", "dpo", "kl") if name in names}
        self.base, self._seed, self._root = "seed/model", seed, root

    def prepare(self, dev, test):
        self.calls.append(("prepare", self._seed))

    def rates(self, arm):
        return () if arm == "seed" else (3e-4, 1e-4)

    def train(self, arm, rate, directory):
        self.calls.append((arm, rate, self._seed))
        write_jsonl(f"{directory}/weights.jsonl", [])
        return f"{arm}@{rate:g}"

    def asked(self, split):
        return f"{self._root}/{split}"

    def learnt(self, arm, directory):
        return Learnt(0, None) if arm == "seed" else Learnt(8, 0.5)

    def extras(self):
        return {"auroc": {"mutual": 0.9 + 0.02 * self._seed}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**settings): what was called; the report lies in tmp_path/out."""
    monkeypatch.setattr(lab_ablation, "MuscArms", Fake)
    monkeypatch.setattr(Fake, "calls", [])

    def answer(model, asked, output, temperature, seed=0, samples=1):
        right = Fake.right[model] + (asked.endswith("test") and temperature == 0)
        prompt = [{"role": "user", "content": ASKED}]
        return [{"prompt": prompt, "response": RIGHT if i < right else WRONG} for i in range(10)]

    def fit(module, *flags):
        output = dict(flag.removeprefix("--config.").split("=") for flag in flags[1:])["output"]
        Fake.calls.append(("fit", output.split("seed_")[-1][0]))
        write_jsonl(f"{output}/gate.json", [dict.fromkeys(GATED, Fake.gate)])

    monkeypatch.setattr(lab_steps, "answer", answer)
    monkeypatch.setattr(lab_ablation, "run_step", fit)

    def call(**settings):
        del Fake.calls[:]
        config = get_config()
        config.update({"output": f"{tmp_path}/out", "seeds": (0, 1, 2), "arms": ("seed", "dpo", "kl"), "processes": 1})
        config.update_from_flattened_dict(settings)
        ablate(from_config_dict(LabAblationConfig, config.to_dict()))
        return sorted(Fake.calls, key=str)

    return call


def dev(shares):
    return {rate: {"all_met": share, "seconds": 1.0} for rate, share in shares.items()}


def _shares(dev):
    return {rate: found["all_met"] for rate, found in dev.items()}


def test_each_arm_is_measured_with_the_rate_that_development_chose(run, tmp_path):
    calls = run()
    assert len(calls) == 3 + 3 + 2 * (2 + 3)  # seed models, preparations, of two arms two rates on one seed, then one
    arms = tmp_path / "out/seed_1/musc/arms"
    results = {arm: json.loads((arms / arm / "result.json").read_text()) for arm in ("seed", "dpo", "kl")}
    assert results["dpo"]["rate"] == 3e-4 and _shares(results["dpo"]["dev"]["0"]) == {"0.0003": 0.6, "0.0001": 0.4}
    assert results["kl"]["rate"] == 1e-4  # of equals the lower
    assert results["seed"]["rate"] is None and results["seed"]["dev"] == {}
    assert results["dpo"]["test"]["sampled"] == {"all_met": 0.6, "each": 0.8, "well_formed": 1.0}
    assert results["dpo"]["test"]["greedy"]["all_met"] == 0.7
    assert (results["dpo"]["rows"], results["dpo"]["truth"]) == (8, 0.5)
    tried = tmp_path / "out/seed_0/musc/arms/dpo"
    assert {p.name for p in tried.iterdir() if p.is_dir()} == {"0.0003"}  # the other is not kept
    report = json.loads((tmp_path / "out/report.json").read_text())["musc"]
    assert report["arms"]["kl"]["against_base"]["all_met"]["difference"] == pytest.approx(0.1)
    assert report["extras"]["auroc"]["mutual"]["mean"] == pytest.approx(0.92)


def test_what_is_done_is_not_done_again(run, tmp_path):
    run()
    report = (tmp_path / "out/report.md").read_text()
    assert run() == []
    (tmp_path / "out/seed_2/musc/arms/kl/result.json").unlink()
    assert run() == [("kl", 0.0001, 2), ("prepare", 2)]
    assert (tmp_path / "out/report.md").read_text() == report
    # More seeds and other arms may be asked of the same directory, other data may not
    assert {call[0] for call in run(seeds=(0, 1, 2, 3), arms=("dpo",))} == {"fit", "prepare", "dpo"}
    with pytest.raises(UserError, match="test"):
        run(test=100)


def test_an_arm_that_fails_leaves_the_others_and_goes_on_later(run, tmp_path, monkeypatch):
    train = Fake.train

    def failing(self, arm, rate, directory):
        if (arm, self._seed) == ("dpo", 1):
            raise UserError("out of luck")
        return train(self, arm, rate, directory)

    with monkeypatch.context() as patch:
        patch.setattr(Fake, "train", failing)
        with pytest.raises(UserError, match="out of luck"):
            run()
    assert json.loads((tmp_path / "out/report.json").read_text())["musc"]["arms"]["dpo"]["seeds"] == [0]
    assert ("dpo", 0.0003, 1) in run()
    assert json.loads((tmp_path / "out/report.json").read_text())["musc"]["arms"]["dpo"]["seeds"] == [0, 1, 2]


def test_models_below_the_gate_stay_refused_and_are_all_named(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Fake, "gate", 0.5)
        for _ in range(2):  # the second time their numbers are there already
            with pytest.raises(UserError, match=r"below the gate of 90%: seed 0 \(start_with 50.0% and .*, seed 2 \("):
                run()
    assert ("prepare", 0) in run(gate=0.4)


def test_a_seed_model_that_is_there_is_not_fitted_again(run, tmp_path):
    there = tmp_path / "there"
    with pytest.raises(UserError, match=f"config.fitted={there}: no seed model; launch.lab_seed and"):
        run(seeds=(0,), fitted=str(there))
    write_jsonl(f"{there}/gate.json", [dict.fromkeys(GATED, 1.0)])
    settings = {"world": "lists", "seed": 0, "rows": 60000}
    write_jsonl(f"{there}/config.json", [{"command": "lab_seed", "config": settings | {"world": "trips", "rows": 5}}])
    with pytest.raises(UserError, match="fitted with world=trips, not lists; rows=5, not 60000: give another"):
        run(seeds=(0,), fitted=str(there))
    write_jsonl(f"{there}/config.json", [{"command": "lab_seed", "config": settings}])
    interrupted = tmp_path / "out/seed_0/seed"
    interrupted.mkdir(parents=True)
    with pytest.raises(UserError, match="seed_0/seed: a fit that was interrupted; remove it, or"):
        run(seeds=(0,), fitted=str(there))
    interrupted.rmdir()
    assert {call[0] for call in run(seeds=(0,), fitted=str(there))} == {"prepare", "dpo", "kl"}
    assert (tmp_path / "out/seed_0/seed/gate.json").read_bytes() == (there / "gate.json").read_bytes()
    assert ("fit", "1") in run(seeds=(0, 1))  # it may be given once, and others follow


def test_arms_beside_each_other_give_the_same_report(run, tmp_path):
    def report(output):
        found = json.loads((tmp_path / output / "report.json").read_text())["musc"]
        assert all(arm.pop("seconds") for arm in found["arms"].values())
        return found

    alone = run()
    assert run(output=f"{tmp_path}/other", processes=3) == alone
    assert report("other") == report("out")


def test_a_training_that_chose_the_rate_counts_too(run, tmp_path):
    run()
    arm = tmp_path / "out/seed_0/musc/arms/kl"
    found = json.loads((arm / "dev.json").read_text())
    write_jsonl(f"{arm}/dev.json", [{rate: {**row, "seconds": 1000.0} for rate, row in found.items()}])
    (arm / "result.json").unlink()
    run()
    assert json.loads((arm / "result.json").read_text())["seconds"] >= 1000
    with pytest.raises(UserError, match="rate_seeds"):
        run(seeds=(1, 2))  # the rates of those arms were chosen on seed 0


def test_bad_settings_are_named(run):
    for settings, message in (
        ({"method": "dpo"}, "config.method='dpo': must be musc, main or both"),
        ({"world": "moon"}, "config.world='moon': unknown world; choose lists or trips"),
        ({"seeds": (1, 1)}, "config.seeds=.1, 1.: give at least one, each once"),
        ({"fitted": "some/where"}, "config.fitted=some/where is of one seed; set config.seeds to it, not to .0, 1, 2."),
        ({"rate_seeds": (7,)}, "config.rate_seeds=.7,.: all must be among config.seeds=.0, 1, 2."),
        ({"arms": ("dpo", "dqo")}, "config.arms: unknown arm 'dqo'; choose from .*calibrated_entropy"),
        ({"main.base": "start"}, "config.main.base='start': no stage of the seed model; choose pretraining or clean"),
        ({"main.rounds": 4}, "config.main.rounds=4: must lie between 1 and 3"),
        ({"musc.rates": ()}, "config.musc.rates and config.musc.tuning_rates: give at least one"),
        ({"arms": ("seed_only",)}, "config.arms: unknown arm 'seed_only'"),  # MAIN's, which is not measured
    ):
        with pytest.raises(UserError, match=message):
            run(**settings)


def test_of_equal_rates_the_lowest_is_best():
    assert best_rate((3e-4, 1e-4, 1e-3), [dev({"0.0003": 0.5, "0.0001": 0.5, "0.001": 0.4})]) == 1e-4


def test_the_best_rate_is_best_on_all_seeds_together(run, tmp_path):
    two = [dev({"0.0001": 0.5, "0.0003": 0.4}), dev({"0.0001": 0.3, "0.0003": 0.5})]
    assert best_rate((1e-4, 3e-4), two) == 3e-4
    assert best_rate((1e-4,), []) == 1e-4  # nothing to choose
    calls = run(rate_seeds=(1, 2))
    assert sum(call[0] == "dpo" for call in calls) == 2 * 2 + 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux says which cores a thread runs on")
def test_steps_beside_each_other_have_cores_of_their_own():
    cores = os.sched_getaffinity(0)
    together = threading.Barrier(len(cores))
    with ThreadPoolExecutor(len(cores), initializer=own_cores(len(cores))) as pool:

        def taken(_):
            together.wait()
            return json.loads(subprocess.check_output([sys.executable, "-c", SHOW_CORES]))

        given = list(pool.map(taken, cores))
    assert sorted(given) == sorted([core] for core in cores)
    assert os.sched_getaffinity(0) == cores
    with ThreadPoolExecutor(1, initializer=own_cores(len(cores) + 1)) as pool:  # more than there are: as before
        assert pool.submit(os.sched_getaffinity, 0).result() == cores


METHOD = Method("musc", {"seed": "untrained", "dpo": "plain", "kl": "by kl"}, "dpo", {"negate": "never asked"})


def result(arm, seed, sampled, greedy=0.5, rate=1e-4):
    test = {
        "sampled": {"all_met": sampled, "each": 0.9, "well_formed": 1.0},
        "greedy": {"all_met": greedy, "each": 0.9, "well_formed": 1.0},
    }
    given = {"rate": None, "rates": []} if arm == "seed" else {"rate": rate, "rates": [1e-4, 3e-4, 1e-3]}
    learnt = {"rows": 0, "truth": None} if arm == "seed" else {"rows": 8, "truth": 0.5}
    return {"method": "musc", "seed": seed, "arm": arm, "test": test, "seconds": 1.0, **given, **learnt}


def test_the_report_by_hand(tmp_path):
    results = [result("seed", seed, 0.2) for seed in range(3)]
    results += [result("dpo", seed, 0.4, rate=3e-4) for seed in range(3)]
    results += [result("kl", seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))]
    report = report_of(METHOD, results, {0: {"truth": {"all": 0.5}}, 1: {"truth": {"all": 0.7}}})
    against = report["arms"]["kl"]["against_base"]["all_met"]
    assert against["difference"] == pytest.approx(0.2)
    assert against["half_width"] == pytest.approx(0.1 / 3**0.5 * 4.302653, rel=1e-5)
    assert against["p"] == pytest.approx(0.0741799, rel=1e-4)  # t = 2 sqrt(3) with 2 degrees of freedom
    assert report["arms"]["dpo"]["against_base"] == {"all_met": None, "all_met_greedy": None}
    assert report["comparisons"] == 2
    assert report["arms"]["kl"]["at_edge"] == 3 and report["arms"]["dpo"]["at_edge"] == 0
    text = markdown(METHOD, report, 0.5)
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("|")}
    assert rows["kl"][2:5] == ["60.0 ± 24.8", "+20.0 ± 24.8", "0.0742"]
    assert rows["dpo"][2:5] == ["40.0 ± 0.0", "", ""]
    assert rows["kl"][-1] == "0.0001* |" and rows["dpo"][-1] == "0.0003 |"
    assert "- negate: left out, never asked" in text
    assert "2 comparisons were made" in text and "threshold is 0.0250" in text
    assert "all 60.0 ± 127.1" in text  # of two seeds, t is 12.7
    plot_method(METHOD, report, f"{tmp_path}/plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_seeds_may_differ_in_what_was_measured_besides():
    found = {0: {"weights": {"kl": 0.5, "pmi": 0.1}}, 1: {}, 2: {"weights": {"kl": 0.7}}}
    extras = report_of(METHOD, [], found)["extras"]
    assert extras["weights"]["kl"]["values"] == {"0": 0.5, "2": 0.7}
    assert extras["weights"]["pmi"]["values"] == {"0": 0.1}


def test_steps_share_what_they_compile_and_nobody_else_does(run, tmp_path, monkeypatch):
    seen, train = [], Fake.train

    def look(self, *arguments):
        seen.append(os.environ["JAX_COMPILATION_CACHE_DIR"])
        return train(self, *arguments)

    monkeypatch.setattr(Fake, "train", look)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    torn = tmp_path / "out/compiled/half"
    run()
    torn.parent.mkdir()
    torn.write_text("")
    (tmp_path / "out/seed_2/musc/arms/kl/result.json").unlink()
    run()
    assert set(seen) == {f"{tmp_path}/out/compiled"} and not torn.exists()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    (tmp_path / "out/seed_2/musc/arms/kl/result.json").unlink()
    run()
    assert seen[-1] == "mine" == os.environ["JAX_COMPILATION_CACHE_DIR"]


def test_one_seed_is_shown_without_intervals():
    report = report_of(METHOD, [result("seed", 0, 0.2), result("dpo", 0, 0.4)], {})
    assert report["arms"]["seed"]["against_base"]["all_met"] is None and report["comparisons"] == 0
    text = markdown(METHOD, report, 0.5)
    assert "| 40.0 |" in text and "±" not in text and "nothing is compared" in text
    assert markdown(METHOD, report_of(METHOD, [], {}), 0.5)  # before the first arm is done


def test_logged_steps_write_to_their_own_file(tmp_path, capfd):
    def task(name):
        with logged(tmp_path / f"{name}.txt"):
            run_step("timeit", "-n1", "-r1", f"print('{name}')")

    threads = [threading.Thread(target=task, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, other in (("one", "two"), ("two", "one")):
        text = (tmp_path / f"{name}.txt").read_text()
        assert text.startswith("$ python -m timeit") and f"\n{name}\n" in text and other not in text
    assert sorted(capfd.readouterr().out.splitlines()) == [f"timeit: see {tmp_path}/{n}.txt" for n in ("one", "two")]
    with logged(tmp_path / "bad.txt"), pytest.raises(UserError, match=f"no_such_module.*; see {tmp_path}/bad.txt"):
        run_step("no_such_module")
    run_step("timeit", "-n1", "-r1", "print('three')")
    assert "$ python -m timeit" in capfd.readouterr().out
