"""Ablations: files checked before the first run, runs skipped, continued and stopped, scores and tables reckoned otherwise."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from pmpseg import Segmenter, ablate
from pmpseg.ablation import job, runs, table, timing
from pmpseg.ablation.chart import charts
from pmpseg.ablation.forms import at_half, score_forms
from pmpseg.ablation.runs import Job
from pmpseg.ablation.scoring import Phrases, asked_as, score_splits
from pmpseg.ablation.spec import Ablation
from pmpseg.ablation.timing import step_seconds
from pmpseg.data import Scenes
from pmpseg.errors import InputError
from pmpseg.evaluate import build_data, evaluate, own_data
from pmpseg.evaluation import Evaluator
from pmpseg.hub import shipped_or
from pmpseg.models.clip import TextEncoder
from pmpseg.models.clipseg import CLIPSeg
from pmpseg.models.pmp import PMP
from pmpseg.models.region import RegionClassifier
from pmpseg.region_stage import RegionStage
from pmpseg.training import PMPModule
from pmpseg.vocabulary import Vocabulary

CONF = Path(__file__).parents[1] / "conf"
TINY = {
    "model.backbone": "test_resnet", "model.dim": 32, "model.num_queries": 6, "model.num_layers": 2, "model.num_heads": 4,
    "model.ffn_dim": 32, "model.num_points": 64, "model.few_prompts": 0.5, "data.image_size": 64,
    "data.train_length": 12, "data.val_length": 4, "data.test_length": 6, "data.batch_size": 2, "data.num_workers": 0,
    "trainer.max_steps": 24, "trainer.val_check_interval": 12, "trainer.log_every_n_steps": 1, "trainer.accelerator": "cpu",
    "save_every": 1,
}  # fmt: skip
SPEC = {
    "base_name": "pmp",
    "base": {"configs": ["conf/pmp_scenes.yaml"], "options": TINY},
    "variants": {"blind": {"model.prompt_attention": "none"}},
    "groups": {"attention": ["blind"]},
}


def tuned(**options) -> dict:
    """Two second stages, of which one goes on from the other."""
    regions = {"configs": ["conf/region_scenes.yaml"]}
    further = {"model.clip": "{tuned}/model", "model.tune": "prompts", "model.mask_prompt_depth": 2} | options
    return {"tuned": regions | {"options": {"model.tune": "all"}}, "deep": regions | {"options": further}}


TUNED = tuned()


def write(folder: Path, **changes) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(SPEC | changes))
    return path


@pytest.fixture(autouse=True, scope="module")
def _beside_conf():
    before = os.getcwd()
    os.chdir(CONF.parent)  # where conf/pmp_scenes.yaml is found from
    yield
    os.chdir(before)


# ---- the file


@pytest.mark.parametrize("path", sorted(CONF.glob("ablation/*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_resolve(path):
    ablation = Ablation.read(path)
    built = ablate.build(ablation, set(ablation.trainings))
    assert list(built) == list(ablation.trainings)
    grouped = [name for names in ablation.groups.values() for name in names]
    assert sorted(grouped) == sorted(ablation.rows[1:])  # each variant changes one factor, and no factor is forgotten


@pytest.mark.parametrize("path", sorted(CONF.glob("ablation/*.yaml")), ids=lambda path: path.stem)
def test_shipped_variants_differ_in_one_key(path):
    """But for runs of another kind, which are given whole."""
    content = yaml.safe_load(path.read_text())
    assert all(len(options) == 1 or "configs" in options for options in (content.get("variants") or {}).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"blind": {"model.promt_attention": "none"}}}, "blind: unknown key .*mean 'model.prompt_attention'"),
        ({"variants": {"blind": {"model.prompt_attention": "non"}}}, "prompt_attention: got 'non', want .*did you mean 'none'"),
        ({"variants": {"wide": {"model.dim": 30}}, "groups": {}}, "wide: dim: got 30, want a multiple of 4"),
        ({"variants": {"same": {"model.dim": 32}}, "groups": {}}, "same does not differ from the base"),
        ({"variant": {}}, "unknown key 'variant': did you mean 'variants'"),
        ({"groups": {"attention": ["blnd"]}}, "groups: attention: got 'blnd', want .*did you mean 'blind'"),
        ({"variants": {"a/b": {"model.dim": 64}}, "groups": {}}, "'a/b' becomes a folder"),
        ({"variants": {"pmp": {"model.dim": 64}}, "groups": {}}, "'pmp' is given twice"),
        ({"variants": {"blind": {"data.seed": 4}}}, "data.seed is set for every run"),
        ({"variants": {"blind": ["none"]}}, r"blind: got \['none'\], want options"),
        ({"evaluate": {"all": {"askd": "mixed"}}}, "all: unknown key 'askd': did you mean 'asked'"),
        ({"evaluate": {"all": {"model": "bland"}}}, "all: model: got 'bland', want .*did you mean 'blind'"),
        ({"evaluate": {"crop": {"region": "tiny_clip", "mode": "corp"}}}, "crop: mode: got 'corp', want .*did you mean 'crop'"),
        ({"evaluate": {"crop": {"region": "tiny_clip", "weight": 2}}}, "crop: weight: got 2, want 0 .* to 1"),
        ({"evaluate": {"crop": {"mode": "crop"}}}, "crop: mode, weight, templates are of a second stage: give region"),
        ({"evaluate": {"crop": {"templates": ["a {}"]}}}, "crop: mode, weight, templates are of a second stage: give region"),
        ({"evaluate": {"crop": {"region": "tiny_clip", "templates": ["a"]}}}, r"templates: got \['a'\], want .* one '{}'"),
        ({"evaluate": {"crop": {"region": "tiny_clip", "templates": "a {}"}}}, "templates: got 'a {}', want a list"),
        ({"evaluate": {"crop": {"region": "pmp"}}}, "crop: region: got 'pmp', which trains no second stage"),
        ({"parts": TUNED, "evaluate": {"pool": {"region": "deep", "mode": "pool"}}}, "pool: mode 'pool' cuts .*prompt_depth 2"),
        ({"parts": tuned(**{"model.mask_promt_depth": 2})}, "deep: unknown key .*mean 'model.mask_prompt_depth'"),
        ({"parts": tuned(**{"model.mask_prompt_depth": 99})}, "deep: mask_prompt_depth: got 99, want at most"),
        ({"parts": tuned(**{"model.tune": "promts"})}, "deep: .*tune: got 'promts', want .*did you mean 'prompts'"),
        ({"parts": tuned(**{"model.clop": "{tuned}/model"})}, "deep: unknown key 'model.clop'"),
        ({"parts": tuned(**{"data.seed": 100})}, "deep.options: data.seed is set .*or give a part.s as"),
        ({"parts": TUNED | {"tuned": {"options": {"model.clip": "{deep}/model"}}}}, "each needs the next"),
        ({"asked": "together"}, "asked: got 'together', want one of alone, forms, mixed"),
        ({"base": {"configs": ["conf/pmp_scene.yaml"]}}, "no configuration .*did you mean 'conf/pmp_scenes.yaml'"),
    ],
)
def test_mistakes_are_found_before_the_first_run(changes, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        ablate.main([str(write(tmp_path, **changes)), "--out", str(tmp_path / "out")])
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_mistakes_on_the_command_line(tmp_path):
    path = write(tmp_path)
    for args, message in [
        ([str(path), "--only", "blnd"], "--only blnd: .*did you mean 'blind'"),
        ([str(path), "--seeds", "0"], "--seeds: got 0, want 1 or more"),
        ([str(path), "--report", "--out", str(tmp_path / "no")], "no runs in .*leave out --report"),
        ([str(tmp_path / "tiny.yml")], "no ablation .*did you mean .*tiny.yaml"),
    ]:
        with pytest.raises(InputError, match=message):
            ablate.main(args)


def test_a_run_is_the_base_with_one_difference_and_its_seed(tmp_path):
    ablation = Ablation.read(write(tmp_path, variants={"blind": {"model.prompt_attention": "none", "model.dim": 64}}))
    pmp, blind = runs.jobs(ablation, tmp_path, 2, {"pmp", "blind"})[2:]
    assert (blind.name, blind.seed, blind.folder) == ("blind", 1, tmp_path / "blind_1")
    options = dict(zip(blind.settings["fit"][::2], blind.settings["fit"][1::2], strict=True))
    of_base = dict(zip(pmp.settings["fit"][::2], pmp.settings["fit"][1::2], strict=True))
    assert options == of_base | {"--model.dim": "64", "--model.prompt_attention": "none"}
    assert options["--data.seed"] == options["--seed_everything"] == "1"


def test_what_only_needs_is_run_too(tmp_path):
    parts = {"region": {"configs": ["conf/pmp_scenes.yaml"], "options": {"model.text": "{blind}/model"}}}
    ablation = Ablation.read(write(tmp_path, parts=parts, evaluate={"mixed": {"model": "region", "asked": "mixed"}}))
    assert ablate.chosen(ablation, ["mixed"]) == {"pmp", "mixed", "region", "blind"}
    assert ablation.rows == ["pmp", "blind", "mixed"]  # a part has no row
    found = {job.name: job for job in runs.jobs(ablation, tmp_path, 1, {"region", "mixed"})}
    assert str(tmp_path / "blind_0") + "/model" in found["region"].settings["fit"]
    assert found["region"].settings["score"] is None  # it may be anything that pmpseg.fit trains
    assert found["region"].needs == [tmp_path / "blind_0"] and found["mixed"].settings["model"] == "../region_0/model"


def test_a_second_stage_is_a_part_of_the_same_seed_or_a_clip(tmp_path):
    parts = {"depth_1": {"configs": ["conf/pmp_scenes.yaml"]}}
    asked = {"own": {"region": "depth_1", "weight": 0.5}, "shipped": {"region": "tiny_clip", "mode": "pool"}}
    ablation = Ablation.read(write(tmp_path, parts=parts, evaluate=asked, asked="mixed"))
    found = {job.folder.name: job for job in runs.jobs(ablation, tmp_path, 2, {"own", "shipped", "pmp"})}
    assert found["own_1"].settings["score"] == {"asked": "mixed", "region": "../depth_1_1/model", "weight": 0.5}
    assert found["own_1"].needs == [tmp_path / "depth_1_1", tmp_path / "pmp_1"]
    assert found["shipped_0"].settings["score"] == {"asked": "mixed", "region": "tiny_clip", "mode": "pool"}
    assert found["shipped_0"].needs == [tmp_path / "pmp_0"] and found["pmp_0"].settings["score"] == {"asked": "mixed"}


def test_a_part_may_have_data_of_another_seed(tmp_path):
    ablation = Ablation.read(write(tmp_path, parts=tuned(**{"data.seed": "{seed+100}"})))
    found = {job.folder.name: job.settings["fit"] for job in runs.jobs(ablation, tmp_path, 2, {"tuned", "deep"})}
    for name, wanted in (("tuned_1", "1"), ("deep_0", "100"), ("deep_1", "101")):
        seeds = [word for key, word in zip(found[name], found[name][1:], strict=False) if key == "--data.seed"]
        assert seeds == [wanted]
    assert found["deep_1"][found["deep_1"].index("--seed_everything") + 1] == "1"


def test_a_second_stage_asked_otherwise_is_as_one_built_so():
    region = RegionStage.load("tiny_clip")
    image, masks = torch.rand(1, 3, 64, 64), torch.rand(1, 4, 64, 64)
    asked = asked_as(region, {"asked": "mixed", "mode": "pool", "weight": 0.2, "templates": ["a {}"]})
    name = shipped_or("tiny_clip")
    built = RegionStage(RegionClassifier(name, mode="pool", weight=0.2), TextEncoder(name, ["a {}"]))
    words = ["red circle", "blue square"]
    with torch.no_grad():
        (ours, _), (wanted, _) = (s.classifier(image, masks, s.ask(image, words).names[None]) for s in (asked, built))
        bare, _ = built.classifier(image, masks, region.ask(image, words).names[None])
    assert torch.equal(ours, wanted) and not torch.allclose(ours, bare, atol=1e-2)
    assert asked.classifier.weight == 0.2 and region.classifier.mode == "crop"  # which stays as it was


def test_mask_prompts_refuse_to_pool():
    prompted = RegionStage(RegionClassifier(shipped_or("tiny_clip"), mask_prompt_depth=2), TextEncoder(shipped_or("tiny_clip")))
    with pytest.raises(InputError, match="mode 'pool' cuts nothing out: got mask_prompt_depth 2"):
        asked_as(prompted, {"mode": "pool"})


# ---- starting and stopping, with a job that trains nothing

FAKE = """
import json, os, sys, threading, time
from pmpseg.ablation.job import _end_with_stdin
folder = sys.argv[1]
name = os.path.basename(folder)
print("began", name, flush=True)
with open(os.path.join(folder, "..", "order.txt"), "a") as file:
    file.write(name + " ")
if name.startswith("wrong"):
    print("pmpseg: error: the loss is nan at step 3\\n")
    sys.exit(2)
if name.startswith("long"):
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    time.sleep(100)
os.makedirs(os.path.join(folder, "model"), exist_ok=True)
for path, content in (("model/config.json", {}), ("metrics.json", {}), ("scores.json", {"numbers": {}, "record": {}})):
    with open(os.path.join(folder, path), "w") as file:
        json.dump(content, file)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(runs, "COMMAND", [sys.executable, str(tmp_path / "fake.py")])
    out = tmp_path / "out"

    def made(name: str, *needs: str, fit: list[str] | None = None) -> Job:
        settings = {"fit": ["--x", "1"] if fit is None else fit, "model": "model", "score": {}}
        return Job(name, 0, out / f"{name}_0", settings, [out / f"{n}_0" for n in needs])

    return made


def order(job: Job) -> list[str]:
    path = job.folder.parent / "order.txt"
    return path.read_text().split() if path.exists() else []


def test_done_runs_are_skipped_and_needs_come_first(fake):
    jobs = [fake("late", "early"), fake("early"), fake("other")]
    counted = []
    assert runs.run(jobs, 1, lambda: counted.append(1)) == []
    assert order(jobs[0]).index("early_0") < order(jobs[0]).index("late_0") and len(counted) == 3
    assert runs.run(jobs, 1) == [] and len(order(jobs[0])) == 3
    (jobs[2].folder / "scores.json").unlink()
    assert runs.run(jobs, 1) == [] and order(jobs[0])[3:] == ["other_0"]
    (jobs[1].folder / "model" / "config.json").unlink()  # a run without its model is not done
    assert runs.run(jobs, 1) == [] and order(jobs[0])[4:] == ["early_0"]


def test_a_failure_is_named_and_the_others_go_on(fake):
    jobs = [fake("wrong"), fake("needy", "wrong"), fake("good")]
    failed = runs.run(jobs, 2)
    assert len(failed) == 2 and all(len(line.splitlines()) == 1 for line in failed)
    assert failed[0].startswith("wrong_0: pmpseg: error: the loss is nan at step 3 (log: ")
    assert failed[1] == "needy_0: wrong_0, which it needs, failed"
    assert jobs[2].done and "needy_0" not in order(jobs[0])


def test_a_failure_gives_status_1_and_the_table_of_the_rest(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "build", lambda *_: {})
    path = write(tmp_path, variants={"wrong": {"model.dim": 64}}, groups={})
    assert ablate.main([str(path), "--seeds", "1", "--out", str(tmp_path / "out"), "--parallel", "1"]) == 1
    said = capsys.readouterr()
    assert "failed: wrong_0: pmpseg: error: the loss is nan" in said.err and "|  | pmp | 1 |" in said.out
    assert [row["variant"] for row in table.read(tmp_path / "out" / "table.csv")] == ["pmp"]


def test_one_name_more_times_all_in_one_go(tmp_path, fake, monkeypatch):
    one = SimpleNamespace(model=None, datamodule=SimpleNamespace(train_dataloader=lambda: [None]))
    monkeypatch.setattr(ablate, "build", lambda ablation, names: dict.fromkeys(names, one))
    calls = []

    def measured(models):
        calls.append(set(models))
        return dict.fromkeys(models, float(len(calls)))

    monkeypatch.setattr(timing, "step_seconds", measured)
    monkeypatch.setattr(table, "markdown", lambda *_: "")  # these runs have no scores to show
    path = write(tmp_path, variants={"blind": {"model.dim": 64}, "tokens": {"model.dim": 128}}, groups={})
    for only in ("blind", "tokens", "blind"):
        assert ablate.main([str(path), "--seeds", "1", "--only", only, "--out", str(tmp_path / "out"), "--parallel", "1"]) == 0
    assert calls == [{"pmp", "blind"}, {"pmp", "blind", "tokens"}]
    assert [row["step_seconds"] for row in table.read(tmp_path / "out" / "table.csv")] == [2.0, 2.0, 2.0]


def test_an_interrupt_ends_all_processes(fake):
    jobs = [fake("long_a"), fake("long_b"), fake("never")]
    started = []
    start = Job.start

    def remember(self):
        started.append(start(self))
        return started[-1]

    def interrupt():
        while len(order(jobs[0])) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "start", remember)
        threading.Thread(target=interrupt).start()
        runs.run(jobs, 2)
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert not jobs[2].folder.exists()


def test_two_commands_do_not_share_a_folder(tmp_path):
    with ablate.alone(tmp_path), pytest.raises(InputError, match="another ablate is at work"), ablate.alone(tmp_path):
        pass
    with ablate.alone(tmp_path):  # afterwards it is free
        pass


def test_a_folder_of_other_settings_is_refused(fake):
    runs.run([fake("good")], 1)
    fake("good").check()
    with pytest.raises(InputError, match=r"was made with '--x 1', now asked for '--x 2': give another --out"):
        fake("good", fit=["--x", "2"]).check()


@pytest.mark.parametrize("kept", ['{"fit": ["--x",', "3", ""])
def test_settings_that_are_broken_are_named_in_one_line(fake, kept):
    one = fake("good")
    one.folder.mkdir(parents=True)
    (one.folder / "settings.json").write_text(kept)
    with pytest.raises(InputError, match=r"good_0/settings.json is broken.*: give another --out, or remove its folder$"):
        one.check()


def test_settings_are_written_whole_or_not_at_all(fake, monkeypatch):
    def dies(self, text, **_):
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", dies)
    with pytest.raises(OSError, match="No space"):
        fake("good").start()
    assert list(fake("good").folder.iterdir()) == []


def test_no_process_outlives_a_kill(tmp_path, fake):
    """SIGKILL cannot be caught: the job's standard input ends, and that ends the job."""
    path = tmp_path / "parent.py"
    path.write_text(
        f"from pathlib import Path; from pmpseg.ablation import runs; runs.COMMAND = {runs.COMMAND!r}\n"
        f"job = runs.Job('long', 0, Path({str(fake('long').folder)!r}), {fake('long').settings!r})\n"
        "start = runs.Job.start\n"
        "def say(self):\n    process = start(self)\n    print(process.pid, flush=True)\n    return process\n"
        "runs.Job.start = say\nruns.run([job], 1)\n"
    )
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        child = int(parent.stdout.readline())
        while not order(fake("long")):
            time.sleep(0.02)
        os.kill(child, 0)  # it is there
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")  # a process that has ended may wait there, as a zombie, for an init that collects it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


# ---- for real: stopped, continued, scored


class Stop(Exception):
    pass


def train_until(step: int, folder: Path, fit: list[str]) -> None:
    def stops(self, batch, index, run=PMPModule.training_step):
        if self.global_step == step:
            raise Stop
        return run(self, batch, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(PMPModule, "training_step", stops)
        job.train(folder, fit)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A table whose first run had been stopped in the middle."""
    folder = tmp_path_factory.mktemp("ablation")
    out, path = folder / "out", write(folder)
    (one,) = runs.jobs(Ablation.read(path), out, 1, {"pmp"})
    train_until(10, one.folder, one.settings["fit"])
    assert (one.folder / "checkpoints" / "last.ckpt").exists() and not one.done
    assert ablate.main([str(path), "--seeds", "1", "--parallel", "1", "--only", "pmp", "--out", str(out)]) == 0
    return out


def test_a_run_that_was_begun_is_continued(finished):
    with (finished / "pmp_0" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(24))  # each once
    assert not (finished / "pmp_0" / "metrics.1.csv").exists()  # continued, not begun anew
    record = json.loads((finished / "pmp_0" / "scores.json").read_text())["record"]
    assert record["seconds"] is None and record["steps"] == 24  # a continued run does not know its time


def test_the_table_of_a_real_ablation(finished):
    (row,) = table.read(finished / "table.csv")
    assert (row["variant"], row["seed"], row["steps"]) == ("pmp", 0, 24) and row["step_seconds"] > 0
    segmenter = Segmenter.load(finished / "pmp_0" / "model")
    assert row["parameters"] == sum(p.numel() for p in segmenter.network.parameters())
    best = json.loads((finished / "pmp_0" / "metrics.json").read_text())["best"]
    assert row["val_phrase_iou"] == pytest.approx(best["phrase_iou"], abs=1e-6)
    assert f"|  | pmp | 1 | {100 * row['iou_at_50']:.1f} |" in (finished / "table.md").read_text()


def test_nothing_is_run_again(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*_0/**/*")}
    assert ablate.main([str(finished.parent / "tiny.yaml"), "--report", "--out", str(finished)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("*_0/**/*")}
    assert (finished / "table.md").read_text() in capsys.readouterr().out


def test_scores_are_those_of_evaluate(finished, tmp_path):
    segmenter = Segmenter.load(finished / "pmp_0" / "model")
    spec = own_data(segmenter.data, "model")
    data = build_data(spec | {"init_args": spec["init_args"] | {"seed": 0}})
    for asked in ("mixed", "alone"):
        wanted = evaluate(segmenter, data, "test", threshold=0.0, phrase_mode=asked)
        rows, classes = score_splits(segmenter, data, asked)
        assert classes["miou"] == pytest.approx(wanted["miou"], abs=1e-6)
        here = [row for row in rows if row["split"] == "test" and row["present"]]
        assert np.mean([row["iou"] for row in here]) == pytest.approx(wanted["phrase_iou"], abs=1e-5)
        assert len(here) == sum(wanted[f"phrase_n_{kind}"] for kind in ("seen", "combination", "word"))
    table.write_rows(tmp_path / "phrases.csv", rows)
    saved = json.loads((finished / "pmp_0" / "scores.json").read_text())["numbers"]
    again = Phrases(tmp_path / "phrases.csv").numbers() | classes
    assert len(again) > 15 and all(saved[name] == pytest.approx(value, abs=1e-6) for name, value in again.items())


def test_templates_reach_the_scores(finished, tmp_path):
    found = []
    for name, options in (("bare", {}), ("a", {"templates": ["a {}"]}), ("same", {"templates": ["{}"]})):
        (tmp_path / name).mkdir()
        options |= {"region": "tiny_clip", "mode": "pool", "weight": 1, "asked": "mixed"}
        job.score(tmp_path / name, finished / "pmp_0" / "model", options)
        found.append([float(row["score"]) for row in csv.DictReader((tmp_path / name / "phrases.csv").open())])
    assert found[0] == pytest.approx(found[2], abs=1e-5) and np.abs(np.subtract(found[0], found[1])).max() > 0.01


def test_a_run_that_was_begun_ends_as_if_it_never_stopped(tmp_path):
    ablation = Ablation.read(write(tmp_path))
    (one,) = runs.jobs(ablation, tmp_path / "out", 1, {"pmp"})
    fit = [*one.settings["fit"], "--trainer.max_steps", "6", "--trainer.val_check_interval", "3"]
    assert job.train(tmp_path / "whole", fit) > 0

    train_until(4, tmp_path / "begun", fit)
    assert not job.is_trained(tmp_path / "begun")
    assert job.train(tmp_path / "begun", fit) is None and job.is_trained(tmp_path / "begun")
    first, second = (Segmenter.load(tmp_path / name / "model").network.state_dict() for name in ("whole", "begun"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


class ClassMasks:
    """Data as a folder's with masks: every class is a phrase, of a kind without a group, and some have synonyms."""

    vocabulary = Vocabulary(["dot", "bar", "box"], [["dot", "red circle"], ["bar"], ["box", "square", "blue square"]])

    def dataset(self, split: str) -> list[dict]:
        rng, items = torch.Generator().manual_seed(len(split)), []
        for index in range(3):
            masks = torch.rand(3, 64, 64, generator=rng) > 0.6
            masks[index] = False
            items.append({
                "image": torch.randint(256, (3, 64, 64), generator=rng, dtype=torch.uint8),
                "labels": masks.int().argmax(0).long(), "prompts": ["bar", "dot", "box"],
                "prompt_masks": masks, "phrase_kind": ["class"] * 3,
            })  # fmt: skip
        return items


@pytest.mark.parametrize("asked", ["mixed", "alone"])
def test_kinds_without_groups_and_synonyms_are_scored_as_the_evaluator_does(asked, tmp_path):
    torch.manual_seed(0)
    text = TextEncoder(shipped_or("tiny_clip"))
    network = PMP(text_dim=text.dim, backbone="test_resnet", dim=32, num_queries=5, num_layers=2, num_heads=4, ffn_dim=32).eval()
    data = ClassMasks()
    rows, numbers = score_splits(Segmenter(network, text, data.vocabulary, 64), data, asked)
    evaluator = Evaluator(data.vocabulary, threshold=0.0, phrase_mode=asked)
    for item in data.dataset("test"):
        batch = {k: v[None] if isinstance(v, torch.Tensor) else [v] for k, v in item.items()}
        evaluator.update(network, text, batch)
    wanted = evaluator.compute()
    here = [row for row in rows if row["split"] == "test" and row["present"]]
    assert np.mean([row["iou"] for row in here]) == pytest.approx(float(wanted["phrase_iou"]), abs=1e-5)
    assert numbers["miou"] == pytest.approx(float(wanted["miou"]), abs=1e-6)
    assert {(row["kind"], row["group"]) for row in rows} == {("class", "")}
    table.write_rows(tmp_path / "phrases.csv", rows)
    found = Phrases(tmp_path / "phrases.csv").numbers()
    assert found["iou_at_60_class"] == found["iou_at_60"] and "iou_at_60_" not in found


# ---- figures


def phrases(path: Path, rows: list[tuple]) -> Phrases:
    columns = ("split", "scene", "kind", "group", "present", "score", "iou", "recall")
    table.write_rows(path, [dict(zip(columns, row, strict=True)) for row in rows])
    return Phrases(path)


def test_phrase_figures_by_hand(tmp_path):
    rows = [("val", 0, "thing", "seen", 0, score, 0, 0) for score in (0.1, 0.2, 0.3, 0.4, 0.9)]
    rows += [("val", 0, "thing", "seen", 1, 0.99, 1.0, 1.0)]
    rows += [("test", 0, "thing", "seen", 0, score, 0, 0) for score in (0.3, 0.35, 0.5, 0.2)]
    rows += [("test", 0, "thing", "seen", 1, 0.5, 0.8, 0.9), ("test", 1, "part", "word", 1, 0.3, 0.6, 0.7)]
    found = phrases(tmp_path / "phrases.csv", rows)
    assert found.threshold(0.5) == 0.3 and found.threshold(0.6) == 0.4  # of five absent ones: three, four at most below or at
    numbers = found.numbers()
    assert numbers["iou_at_50"] == pytest.approx((0.8 + 0) / 2)  # 0.3 is not above 0.3
    assert numbers["absent_accuracy_at_50"] == 0.5 and numbers["absent_accuracy_at_60"] == 0.75
    assert numbers["recall"] == pytest.approx(0.8) and numbers["iou_at_60_part"] == 0.0 and numbers["iou_at_60_thing"] == 0.8


def test_the_table_against_numpy(tmp_path):
    rng = np.random.default_rng(0)
    base, other = rng.random(3), rng.random(3)
    rows = [{"variant": "a", "factor": "", "seed": s, "iou_at_50": v} for s, v in enumerate(base)]
    rows += [{"variant": "b", "factor": "f", "seed": s, "iou_at_50": other[s]} for s in (2, 1, 0)]  # in any order
    rows += [{"variant": "c", "factor": "f", "seed": 1, "iou_at_50": 0.5}]
    text = table.markdown(rows, "t")

    def cell(values, sign=""):
        values = 100 * np.asarray(values)
        return f"{values.mean():{sign}.1f} ± {np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1)):.1f}"

    assert f"|  | a | 3 | {cell(base)} |" in text and f"| f | b | 3 | {cell(other)} |" in text and "| f | c | 1 | 50.0 |" in text
    assert f"| f | b | 3 | {cell(other - base, '+')} |" in text
    assert f"| f | c | 1 | {100 * (0.5 - base[1]):+.1f} |" in text
    assert "With 3 pairs" in text and "exceeds 2.5 times" in text  # 4.303 / sqrt(3), from a table of Student's t
    table.write(rows, tmp_path, "t")
    assert table.markdown(table.read(tmp_path / "table.csv"), "t") == text


def test_an_empty_table_says_so(tmp_path):
    table.write([], tmp_path, "t")
    assert "No run is done yet" in (tmp_path / "table.md").read_text() and table.read(tmp_path / "table.csv") == []


def test_dots_stand_where_their_values_are():
    rows = [{"variant": v, "factor": "", "seed": 0, "recall": x} for v, x in (("a", 0.2), ("b", 0.4), ("c", 0.3))]
    (picture,) = charts(rows)
    pixels = np.asarray(picture).astype(int)
    orange = np.abs(pixels - (0xD5, 0x5E, 0x00)).max(-1) < 8
    lines = np.flatnonzero(orange.any(1))
    upper, lower = orange[lines[0] : lines[0] + 13], orange[lines[-1] - 12 : lines[-1] + 1]
    blue = np.abs(pixels - (0x00, 0x72, 0xB2)).max(-1) < 8
    a, b, c = (np.flatnonzero(m.any(0)).mean() for m in (blue, upper, lower))
    assert c == pytest.approx((a + b) / 2, abs=1.5) and b - a > 300


def test_a_dearer_step_costs_more():
    class Sum(torch.nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times, self.weight = times, torch.nn.Parameter(torch.ones(300, 300))

        def training_step(self, batch, _):
            self.log("train/loss", 0.0)
            x = batch
            for _ in range(self.times):
                x = x @ self.weight / 300
            return x.sum()

    batch, few = torch.ones(300, 300), Sum(5)
    seconds = step_seconds({"few": (few, batch), "many": (Sum(50), batch)}, repeat=5)
    assert seconds["many"] > 3 * seconds["few"] > 0 and few.weight.grad is None


# ---- asked by text and by example


def small_forms() -> tuple[Segmenter, Scenes]:
    torch.manual_seed(0)
    network = CLIPSeg(128, backbone_weights=shipped_or("tiny_clip"), blocks=(1,), dim=16, ffn_dim=32)
    data = Scenes(64, 4, 6, 8, supports=1, eval_batch_size=4, num_workers=0)
    return Segmenter(network, TextEncoder(shipped_or("tiny_clip"), normalize=False), data.vocabulary, 64), data


def test_forms_choose_thresholds_on_validation_and_score_the_test_split():
    segmenter, data = small_forms()
    found = score_forms(segmenter, data)
    for form in ("text", "image"):
        data.class_list = False
        val, test = (evaluate(segmenter, data, split, prompt_form=form) for split in ("val", "test"))
        best = int(np.argmax(val["phrase_curve"]["iou"].numpy()))
        half = int(np.argmax(val["phrase_curve"]["absent_accuracy"].numpy() >= 0.5))
        assert found[f"{form}_iou"] == pytest.approx(float(test["phrase_curve"]["iou"][best]))
        assert found[f"{form}_iou_at_50"] == pytest.approx(float(test["phrase_curve"]["iou"][half]))
        assert found[f"{form}_ap"] == pytest.approx(test["phrase_ap"])
    assert found["text_iou"] != found["image_iou"] and 0 < found["text_ap"] < 1 and "miou_seen" in found
    assert at_half(torch.tensor([0.0, 0.4, 0.5, 0.9])) == 2 and at_half(torch.tensor([0.0, 0.4])) == 1


def test_forms_of_a_network_of_words_and_of_data_without_examples():
    segmenter, data = small_forms()
    segmenter.network = PMP(128, backbone="conv", dim=16, num_queries=4, num_layers=1, num_heads=2, ffn_dim=16).eval()
    found = score_forms(segmenter, data)
    assert "text_ap" in found and "image_ap" not in found
    data.supports = 0
    with pytest.raises(InputError, match=r"set data\.supports"):
        score_forms(segmenter, data)


def test_steps_with_examples_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "step_seconds", partial(step_seconds, repeat=1, warm_up=0))
    names = {"clipseg", "clip_deconv", "pmp"}
    ablate.time_steps(ablate.build(Ablation.read(CONF / "ablation" / "clipseg_models.yaml"), names), tmp_path)
    spent = json.loads((tmp_path / "step_seconds.json").read_text())
    assert spent.keys() == names and all(value > 0 for value in spent.values())


def test_a_variant_may_be_another_kind_of_run(tmp_path):
    other = {"configs": ["conf/clipseg_scenes.yaml"], "options": {"trainer.max_steps": 7}}
    found = Ablation.read(write(tmp_path, variants={"other": other}, groups={}))
    words = found.trainings["other"].arguments(3)
    assert words[:2] == ["-c", str(CONF / "clipseg_scenes.yaml")] and words[2:4] == ["--trainer.max_steps", "7"]
    assert found.rows == ["pmp", "other"] and words[-2:] == ["--data.seed", "3"]
    with pytest.raises(InputError, match=r"other: unknown key 'option'"):
        Ablation.read(write(tmp_path, variants={"other": {"configs": [], "option": {}}}, groups={}))
