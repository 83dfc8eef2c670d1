"""Comparison with other runtimes: workers, the check before timing, tables, what is not set up."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.importorskip("bench.peers", reason="the benchmarks are not part of this tree")

import dass
import dass_kernels
from bench.contest import NotAvailable
from bench.peers import __main__ as command
from bench.peers import catalogue, install, models, race
from bench.peers.catalogue import PEERS
from bench.peers.client import WorkerError
from bench.peers.worker import answer
from dass.engine import tuning
from dass.timing import Sample

EAGER = PEERS["torch-eager"]


@pytest.fixture(autouse=True)
def _no_peers(tmp_path, monkeypatch):
    """What is tested does not depend on what this machine has installed or measured."""
    monkeypatch.setenv("DASS_PEERS", str(tmp_path / "peers"))
    monkeypatch.setenv("DASS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return models.make("resnet20", 0.9, tmp_path_factory.mktemp("case"), width=0.25)


def test_a_worker_answers_until_it_ends(case):
    with race.start(case, EAGER, 1) as worker:
        assert worker.facts["version"] == torch.__version__
        assert race.check(case, EAGER) <= 1e-5
        times = worker.times_ns(3)
        assert len(times) == 3 and all(1e3 < ns < 1e10 for ns in times)
        memory = worker.memory()
        assert memory["peak"] >= memory.get("now", 0)
        assert memory["peak"] > 1 << 26  # torch alone is more
        with pytest.raises(WorkerError, match="ValueError: unknown command 'sleep'"):
            worker._ask("sleep")
        worker._process.wait()
        with pytest.raises(WorkerError, match="ended"):
            worker.times_ns(1)
        failures = {}
        assert race.race({EAGER: worker}, 1, 0, failures) == ({}, {})
        assert "ended" in failures["torch-eager"]
    worker.close()


@pytest.mark.parametrize("line", ["sleep 1", "time", "time many", "time -1"])
def test_a_worker_knows_two_commands(line):
    with pytest.raises(ValueError, match=f"unknown command '{line}'"):
        answer(line + "\n", lambda: None)


def test_a_worker_that_cannot_load_says_why(case):
    with pytest.raises(WorkerError, match="KeyError: 'no such entry'"):
        race.start(case, replace(EAGER, entry="no such entry"), 1)
    with pytest.raises(WorkerError, match="not in bf16"):
        race.start(case, replace(EAGER, precision="bf16"), 1)


def test_only_peers_that_agree_are_timed(case):
    perturbed = dass.densify(case.model)
    with torch.no_grad():
        next(m for m in perturbed.modules() if isinstance(m, nn.Linear)).weight[0] *= 1.01
    case.paths["perturbed"] = case.folder / "perturbed.safetensors"
    dass.save(perturbed, case.paths["perturbed"])
    wrong = replace(EAGER, name="wrong", form="perturbed")
    frozen = PEERS["torch-frozen"]
    result = race.compare(case, [wrong, PEERS["mnn"], EAGER, frozen], rounds=2, seconds=0.01)
    assert [row["peer"] for row in result["rows"]] == ["torch-eager", "torch-frozen"]
    assert "not timed: its output differs" in result["failures"]["wrong"]
    assert "python -m bench.peers setup" in result["failures"]["mnn"]
    for row in result["rows"]:
        assert row["rounds"] == len(row["times_us"]) == 2
        assert row["error"] <= row["tolerance"]
        assert row["ratio"] is None  # OpenVINO took no part
    json.dumps(result)
    assert "- wrong: not timed" in race.table(result)


def test_an_engine_is_timed_from_its_file(case, monkeypatch):
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "RUNS", 1)
    result = race.compare(case, [PEERS["dass-engine"]], rounds=1, seconds=0)
    (row,) = result["rows"]
    assert row["version"] == dass.__version__ and row["precision"] == "fp32"
    assert 0 <= row["error"] <= 1e-5
    assert dass.load_engine(case.paths["engine"]).graph.nodes[0].shape == (3, 32, 32)


def test_wrong_arguments_are_refused_before_anything_runs():
    with pytest.raises(SystemExit, match="openvino is not set up: python -m"):
        command.main(["run", "--peers", "torch-eager", "openvino"])
    with pytest.raises(SystemExit, match="unknown peer 'tflite'; known: onnxruntime"):
        command.main(["run", "--peers", "tflite"])
    with pytest.raises(SystemExit, match="unknown network 'vgg'"):
        command.main(["run", "--network", "vgg"])
    with pytest.raises(SystemExit, match="size must be at least 1"):
        command.main(["run", "--size", "0"])
    with pytest.raises(SystemExit, match="threads must be 1 to"):
        command.main(["run", "--threads", "0"])
    with pytest.raises(SystemExit, match="rounds must be at least 1"):
        command.main(["run", "--rounds", "0"])
    with pytest.raises(SystemExit, match="unknown: tflite"):
        command.main(["setup", "tflite"])


def test_what_is_not_set_up_is_left_out_with_its_reason(monkeypatch):
    found, reasons = catalogue.available()
    assert {peer.runtime for peer in found} == {"torch", "engine"}
    assert "openvino is not set up: python -m bench.peers setup openvino" in reasons
    monkeypatch.setattr(catalogue, "cpu_flags", lambda: {"avx2"})
    with pytest.raises(NotAvailable, match="no amx_bf16 or avx512_bf16"):
        catalogue.available(["openvino-bf16"])


def test_an_environment_of_other_versions_is_not_set_up(monkeypatch):
    folder = install.root() / "mnn"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    facts = {"requirements": ["MNN==3.6.1"], "packages": {"MNN": "3.6.1"}}
    (folder / "dass-peer.json").write_text(json.dumps(facts))
    assert install.python("mnn") == folder / "bin" / "python"
    assert install.setup("mnn") == "MNN==3.6.1: already there"
    monkeypatch.setitem(install.ENVIRONMENTS, "mnn", install.Environment(("MNN==9",), "MNN"))
    with pytest.raises(NotAvailable):
        install.python("mnn")
    (folder / "dass-peer.json").write_text("{")
    with pytest.raises(NotAvailable):
        install.python("mnn")


def test_an_installation_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    # json is in every Python, so nothing is installed but pip.
    monkeypatch.setattr(
        install,
        "ENVIRONMENTS",
        {
            "absent": install.Environment(("--no-index", "no-such-package"), "json"),
            "empty": install.Environment(("--no-index", "pip"), "json"),
        },
    )
    failed = install.setup_all(["absent", "empty", "torch"])
    said = capsys.readouterr().out.splitlines()
    assert failed == ["absent"]
    assert "absent: FAILED: ERROR: No matching distribution found" in said[0]
    assert [line.split(":")[0] for line in said] == ["absent", "empty", "torch"]
    assert install.python("empty").exists()
    with pytest.raises(NotAvailable):
        install.python("absent")


def test_networks_have_the_form_of_their_size(tmp_path):
    assert models.zoo_name("mobilenet_v2", 224) == "mobilenet_v2_imagenet"
    assert models.zoo_name("resnet18", 32) == models.zoo_name("resnet18", None) == "resnet18"
    assert models.zoo_name("resnet50", 224) == "resnet50"
    first, again = (
        models.make("mobilenet_v2", 0.9, tmp_path, size=16, batch=2, width=0.25) for _ in range(2)
    )
    assert first.example.shape == (2, 3, 16, 16)
    assert torch.equal(first.want, again.want)
    dense = [m.weight for m in dass.densify(first.model).modules() if isinstance(m, nn.Conv2d)]
    assert dense[0].count_nonzero() == dense[0].numel()
    assert dense[1].count_nonzero() == pytest.approx(0.1 * dense[1].numel(), abs=1)
    assert first.facts["nonzeros"] < first.facts["weights"]


def test_batchnorm_neither_magnifies_nor_loses_the_signal(tmp_path):
    model = models.make("mobilenet_v2", 0.95, tmp_path, width=0.5).model
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.running_mean.std() > 0 and norm.weight.std() > 0.1 for norm in norms)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, 32, 32, generator=generator)
    near = x + 1e-3 * torch.randn(x.shape, generator=generator)
    with torch.no_grad():
        y, moved, other = model(x), model(near), model(x.flip(3))
    size = y.abs().max()
    assert 1e-5 < (moved - y).abs().max() / size < 1e-2
    assert (other - y).abs().max() / size > 1e-2


def _row(name, times_us, reference=None):
    sample = Sample(times_us, 5)
    facts = {"ready": True, "version": "1.2", "precision": "fp32", "load_seconds": 1.0}
    memory = {"peak": 3 << 20, "now": 2 << 20}
    return race.row(PEERS[name], facts, sample, 1e-6, memory, reference)


def test_the_tables_arithmetic():
    reference = Sample((2000.0, 4000.0, 3000.0), 5)
    fast = _row("torch-frozen", (1000.0, 1000.0, 1500.0), reference)
    assert fast["median_us"] == 1000
    assert fast["spread"] == pytest.approx(0.25)
    assert fast["ratio"] == 2  # of 2, 4 and 2: round by round, not of medians
    assert fast["inferences"] == 5 and fast["times_us"] == [1000, 1000, 1500]
    assert "ready" not in fast
    result = {
        "network": "resnet20", "size": 32, "batch": 1, "threads": 2, "sparsity": 0.9,
        "weights": 1000, "nonzeros": 250, "dense_layers": ["first"], "failures": {"mnn": "why"},
        "rows": [_row("openvino", reference.times_us), fast],
    }  # fmt: skip
    text = race.table(result).splitlines()
    assert text[0] == (
        "resnet20, 32 x 32, batch 1, 2 threads, 90% zeros (75.0% of all weights; dense: first)"
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text[4:6]]
    assert cells[0] == ["torch-frozen", "1.2", "fp32", "NCHW", "2", "1.000", "25%", "3", "2.00"]
    assert cells[1] == ["openvino", "1.2", "fp32", "NCHW", "2", "3.000", "33%", "3", ""]
    assert text[-1] == "- mnn: why"


def test_a_run_writes_its_document(tmp_path, capsys):
    path = tmp_path / "out.json"
    command.main(
        f"run --network resnet20 --sparsity 0.9 --rounds 1 --seconds 0 --peers torch-eager "
        f"sparsify --json {path}".split()
    )
    document = json.loads(path.read_text())
    assert document["facts"]["cpu"] and document["settings"]["reference"] == "openvino"
    (result,) = document["rows"]
    assert result["isa"] == document["settings"]["isa"] == dass_kernels.active_isa()
    assert document["settings"]["dense_isa"] == "best"
    assert {row["peer"] for row in result["rows"]} == {"torch-eager", "sparsify"}
    assert document["failures"] == []
    assert "| sparsify" in capsys.readouterr().out


def test_a_run_kept_to_an_instruction_set_says_so(monkeypatch):
    before = dass_kernels.active_isa()
    if "avx2" not in dass_kernels.available_isas():
        pytest.skip("no AVX2 here")
    monkeypatch.setitem(PEERS, "bf16", replace(EAGER, name="bf16", cpu_flags=("flag",)))
    monkeypatch.setattr(catalogue, "cpu_flags", lambda: {"flag"})
    words = "run --network resnet20 --sparsity 0.9 --rounds 1 --seconds 0 --peers torch-eager bf16"
    try:
        document = command.run(command.parser().parse_args([*words.split(), "--isa", "avx2"]))
    finally:
        dass_kernels.set_isa(before)
    assert document["settings"]["isa"] == document["settings"]["dense_isa"] == "avx2"
    assert [row["isa"] for row in document["rows"]] == ["avx2"]
    assert [row["peer"] for row in document["rows"][0]["rows"]] == ["torch-eager"]
    assert document["notes"] == ["left out: bf16: --isa avx2 is without it"]
