"""Engines on disk, what they say of themselves, and the command that makes them."""

import hashlib
import json

import pytest
import torch
from engine_nets import check, compiled, images, pruned, small_net
from torch import nn
from typer.testing import CliRunner

import dass
from dass import cli
from dass.encoding import CorruptFileError
from dass.engine import compiler, explain, roofline, tuning
from dass.engine.graph import Torch
from dass.engine.saving import check_operation, read_engine
from dass.sealed import ENGINE, MODEL, VersionError, kind_of


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Measurements are short, and nothing reaches the user's cache."""
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "RUNS", 1)
    monkeypatch.setattr(roofline, "PICTURES", dict.fromkeys(roofline.PICTURES, (2, 256)))
    monkeypatch.setenv("DASS_CACHE", str(tmp_path / "cache"))


class Rolled(nn.Module):
    """With an operation that runs in torch, and a constant of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.register_buffer("factor", torch.rand(8, 9, 9))

    def forward(self, x):
        return self.b(torch.roll(self.a(x).relu(), 1, 3) * self.factor)


# Files


@pytest.mark.parametrize("name", ["efficientnet_v2_s", "resnet18", "dass_small"])
def test_a_network_comes_back_bit_for_bit(name, tmp_path):
    model, shape = pruned(name)
    engine = compiled(model, shape)
    engine.save(tmp_path / "net.engine")
    again = dass.load_engine(tmp_path / "net.engine", tune=False, cache=None)
    for batch in (1, 17):
        x = images(batch, *shape)
        assert torch.equal(again(x), engine(x))
    assert again.removed == engine.removed and again.batch == engine.batch


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    model, shape = pruned("mobilenet_v2", exclude="depthwise", side=12)
    engine = dass.compile(model, torch.zeros(16, *shape))
    engine._side_by_side = True
    path = tmp_path / "net.engine"
    engine.save(path)
    monkeypatch.setattr(tuning, "choose", lambda *a: pytest.fail("measured again"))
    again = dass.load_engine(path)
    for batch in (1, 16, 17):
        x = images(batch, *shape)
        assert torch.equal(again(x), engine(x))
    assert again.explain().to_dict() == engine.explain().to_dict()
    again.save(tmp_path / "twice.engine")
    first, second = (read_engine(each) for each in (path, tmp_path / "twice.engine"))
    assert first.programs == second.programs and first.side_by_side and second.side_by_side


def test_on_another_machine_it_is_decided_anew(tmp_path, monkeypatch):
    engine = dass.compile(small_net(), torch.zeros(1, 3, 8, 8), cache=None)
    engine.save(tmp_path / "net.engine")
    monkeypatch.setattr(tuning, "machine_key", lambda: "another")
    for tune in (False, True):
        again = dass.load_engine(tmp_path / "net.engine", tune=tune, cache=None)
        check(again, small_net(), images(3, 3, 8, 8))
        assert bool(again.built(0, False).decisions.measured) == tune


def test_decisions_of_another_version_are_not_used(tmp_path, monkeypatch):
    dass.compile(small_net(), torch.zeros(1, 3, 8, 8), cache=None).save(tmp_path / "net.engine")
    monkeypatch.setattr(tuning, "TEMPLATES", (tuning.Kernel(False, 1, 4),) * 3)
    monkeypatch.setattr(tuning, "EMITTED", ())
    monkeypatch.setattr(tuning, "default_kernel", lambda: tuning.TEMPLATES[0])
    again = dass.load_engine(tmp_path / "net.engine", tune=False, cache=None)
    check(again, small_net(), images(3, 3, 8, 8))


def test_operations_of_torch_are_saved_too(tmp_path):
    model = Rolled().eval()
    engine = compiled(model, (3, 9, 9))
    engine.save(tmp_path / "net.engine")
    again = dass.load_engine(tmp_path / "net.engine", cache=None)
    x = images(5, 3, 9, 9)
    assert any(node.constants for node in again.graph if isinstance(node, Torch))
    assert torch.equal(again(x), engine(x))


def test_the_size_is_that_of_the_nonzeros(tmp_path):
    sizes = []
    for sparsity in (0.5, 0.95):
        model, shape = pruned("resnet18", sparsity)
        compiled(model, shape).save(tmp_path / "net.engine")
        sizes.append((tmp_path / "net.engine").stat().st_size)
    assert sizes[1] < 0.25 * sizes[0]


@pytest.mark.parametrize(
    "target",
    [
        *("aten.from_file.default", "aten.relu_.default", "aten.add.out", "aten.max.dim"),
        *("aten.save.default", "aten.nothing.default", "dass.spmm.default", "aten.relu", ""),
    ],
)
def test_operations_that_are_no_functions_of_tensors_are_refused(target):
    with pytest.raises(ValueError, match=r"no operation of torch.ops.aten|may not stand in a file"):
        check_operation(Torch("y", ["x"], (3,), target, [{"input": 0}], {}))


def test_arguments_of_operations_are_checked():
    for argument in ({"input": 1}, {"constant": "c"}, {"torch": "load"}, {"batch": 1}):
        with pytest.raises(ValueError, match="with the argument"):
            check_operation(Torch("y", ["x"], (3,), "aten.relu.default", [argument], {}))
    good = [{"input": 0}, {"torch": "float32"}]
    check_operation(Torch("y", ["x"], (3,), "aten.to.dtype", good, {}))


def crafted(path, part, change):
    """Alters a part of the header and signs the file anew."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    meta = header["__metadata__"]
    value = json.loads(meta[part])
    changed = change(value)
    meta[part] = json.dumps(value if changed is None else changed)
    meta["dass.sha256"] = "0" * 64
    blank = json.dumps(header, separators=(",", ":")).encode()
    total = len(blank).to_bytes(8, "little") + blank + data[8 + length :]
    digest = hashlib.sha256(total).hexdigest().encode()
    path.write_bytes(total.replace(b"0" * 64, digest, 1))


def node(which, **fields):
    """Alters the first node of a kind in the header's graph."""

    def change(graph):
        next(row for row in graph["nodes"] if row["node"] == which).update(fields)

    return change


def huge(entries):
    next(iter(entries.values()))["shape"] = [2**20, 2**20]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("dass.graph", node("Conv", groups=3)),
        ("dass.graph", node("Conv", shape=[24, 80, 80])),
        ("dass.graph", node("Conv", padding=[9, 9, 9, 9])),
        ("dass.graph", node("Conv", stride=[0, 1])),
        ("dass.graph", node("Conv", stride=[1])),
        ("dass.graph", node("Conv", activation="tanh")),
        ("dass.graph", node("Conv", inputs=["nobody"])),
        ("dass.graph", node("Conv", inputs=[])),
        ("dass.graph", node("Conv", name="a b")),
        ("dass.graph", node("Conv", node="Object")),
        ("dass.graph", node("Conv", weight={"tensor": "none"})),
        ("dass.graph", node("Linear", shape=[8])),
        ("dass.graph", node("Mean", inputs=["x", "x"])),
        ("dass.graph", node("Input", shape=[3, 2**40, 8])),
        ("dass.graph", node("Input", shape=[3.0, 8, 8])),
        ("dass.graph", lambda graph: graph["nodes"].reverse()),
        ("dass.graph", lambda graph: {**graph, "outputs": []}),
        ("dass.graph", lambda graph: [1]),
        ("dass.entries", huge),
        ("dass.entries", lambda entries: {}),
        ("dass.decided", lambda facts: {**facts, "batch": 0}),
        ("dass.decided", lambda facts: facts["programs"][0].update(kernels=[{"emitted": 1}])),
        ("dass.removed", lambda removed: []),
    ],
)
def test_crafted_files_are_refused(part, change, tmp_path):
    path = tmp_path / "net.engine"
    compiled(small_net(), (3, 8, 8)).save(path)
    crafted(path, part, lambda value: None)
    dass.load_engine(path, cache=None)
    crafted(path, part, change)
    with pytest.raises(CorruptFileError, match=str(path)):
        dass.load_engine(path, cache=None)


def test_broken_foreign_and_newer_files(tmp_path):
    path = tmp_path / "net.engine"
    compiled(small_net(), (3, 8, 8)).save(path)
    good = path.read_bytes()
    for length in (0, 7, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CorruptFileError, match="truncated"):
            dass.load_engine(path)
    path.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
    with pytest.raises(CorruptFileError, match="checksum"):
        dass.load_engine(path)
    path.write_bytes(good)
    with pytest.raises(CorruptFileError, match=r"read it with dass.load_engine"):
        dass.load(path)
    crafted(path, "dass.engine", lambda version: version + 1)
    with pytest.raises(VersionError, match="a newer dass can load it"):
        dass.load_engine(path)
    model = tmp_path / "model.safetensors"
    dass.save(dass.zoo.create("resnet20", width=0.25), model)
    with pytest.raises(CorruptFileError, match=r"not of engine.save: read it with dass.load"):
        dass.load_engine(model)
    with pytest.raises(OSError, match="none"):
        dass.load_engine(tmp_path / "none")


# What it says


def test_it_explains_every_step(tmp_path):
    model, shape = pruned("mobilenet_v2", exclude="depthwise", side=12)
    cache = tmp_path / "kernels.json"
    engine = dass.compile(model, torch.zeros(1, *shape), cache=cache)
    told = engine.explain()
    plan = engine.built(0, False).plan
    assert [step.source for step in told.steps] == [step.source for step in plan.steps]
    for step in told.steps:
        assert step.kernel and step.output and 0 <= step.nonzeros <= step.weights
        assert (step.bound_us > 0) == (step.bytes > 0) and step.bound_by
        if step.kind == "rows":
            assert step.why.split(": ")[0] == min(step.measured, key=step.measured.get)
    text = str(told)
    for word in ("features.0.0 Conv2d + BatchNorm2d + ReLU6", "nonzeros", " us", "multiply-adds"):
        assert word in text
    assert max(map(len, text.splitlines())) < 300
    assert json.loads(json.dumps(told.to_dict()))["facts"]["nonzeros"] > 1000
    assert engine.explain().limits == told.limits == roofline.limits(cache)  # from the file
    assert tuning.machine_key() in json.loads(cache.read_text())


def test_it_tells_what_was_removed_and_why_torch_runs():
    model = Rolled().eval()
    with torch.no_grad():
        model.b.weight[:, 2:] = 0
    told = compiled(model, (3, 9, 9)).explain()
    rolled = next(step for step in told.steps if step.kind == "torch")
    assert rolled.kernel == "aten.roll.default" and "no step for aten.roll" in rolled.note
    assert "operations run in torch" in str(told)
    net = small_net()
    with torch.no_grad():
        net[2].weight[:, :5] = 0
    assert compiled(net, (3, 8, 8)).explain().facts["dead_channels"] >= 5


def test_bounds_are_those_of_the_slowest_part():
    limits = roofline.Limits(macs=100.0, l1=200.0, l2=100.0, memory=10.0)
    assert limits.bound(1e6, 1e3) == (10.0, "products")
    assert limits.bound(1.0, 60_000) == (0.3, "bytes, l1")
    assert limits.bound(1.0, 1e6) == (10.0, "bytes, l2")
    assert limits.bound(1.0, 1e8) == (10_000.0, "bytes, memory")


def test_the_machines_limits_are_measured():
    found = roofline.limits(None)
    assert min(found.macs, found.l1, found.l2, found.memory) > 0


@pytest.mark.parametrize("model", ["rolled", "small"])
def test_it_tells_where_time_goes(model):
    net, side = (Rolled().eval(), 9) if model == "rolled" else (small_net(), 8)
    engine = compiled(net, (3, side, side), batch=2)
    before = torch.get_num_threads()
    found = engine.profile(seconds=0.01)
    assert torch.get_num_threads() == before and found.batch == 2 and found.runs >= 3
    assert len(found.steps) == len(engine.explain().steps)
    assert all(step.us >= 0 for step in found.steps) and found.total_us > 0
    times = [step.us for step in found.sorted().steps]
    assert times == sorted(times, reverse=True)
    assert "share" in str(found) and json.dumps(found.to_dict())
    with pytest.raises(ValueError, match="a batch and seconds"):
        engine.profile(torch.zeros(0, 3, side, side))
    assert engine.profile(torch.zeros(20, 3, side, side), seconds=0).batch == 20


def test_names_are_short():
    assert explain.short("a.0 (Conv2d) + a.1 (ReLU)") == "a.0 Conv2d + ReLU"
    assert explain.short("a (Conv2d) + b (ReLU) > c (Conv2d)") == "a > c"
    assert explain.short("x") == "x"


# The command


def ok(*words):
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def saved(tmp_path):
    model, _ = pruned("resnet20")
    fresh = dass.zoo.create("resnet20", num_classes=10, width=0.25)
    fresh.load_state_dict(model.state_dict())
    dass.save(fresh, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_the_command_compiles_a_saved_network(saved, tmp_path):
    out = tmp_path / "net.engine"
    words = ["--size", 12, "--batch", 2, "--explain", "--profile", "--report", tmp_path / "report"]
    text = ok("compile", saved, "-o", out, *words)
    for word in ("over torch's fastest way", "dass.load_engine", "Steps", "Time of each step"):
        assert word in text
    data = json.loads((tmp_path / "report" / "report.json").read_text())["data"]
    assert data["input"] == [2, 3, 12, 12] and data["error"] < 1e-4 and data["samples"]["engine"]
    model = dass.load(saved).eval()
    engine = dass.load_engine(out)
    assert isinstance(engine, compiler.Engine) and engine.batch == 2
    check(engine, model, images(3, 3, 12, 12))


def test_the_command_without_tuning_writes_beside_the_network(saved):
    ok("compile", saved, "--no-tune", "--size", 12)
    assert dass.load_engine(saved.with_suffix(".engine"), tune=False).batch == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch", 0], "--batch must be at least 1"),
        (["--size", 0], "--size must be at least 1"),
        (["--input", "5x8x8"], "does not take an input of that shape"),
    ],
)
def test_a_users_error_is_one_line(saved, words, says):
    done = CliRunner().invoke(cli.app, ["compile", str(saved), *map(str, words)])
    assert done.exit_code == 2 and says in done.output
    same = CliRunner().invoke(cli.app, ["compile", str(saved), "-o", str(saved), "--no-tune"])
    assert same.exit_code == 2 and "is the network itself" in same.output


def test_the_command_evaluates_an_engines_file(saved, tmp_path):
    out, report = tmp_path / "net.engine", tmp_path / "report"
    ok("compile", saved, "-o", out, "--size", 12)
    data = ["--data", "synthetic", "--size", 12, "--out", report]

    def found():
        return json.loads((report / "report.json").read_text())["data"]

    text = ok("evaluate", out, "--batches", "1,2", *data)
    assert "test images right" in text and "images per s" in text and "3x12x12" in text
    engine, said = dass.load_engine(out), found()
    weights = [node.weight for node in engine.graph if hasattr(node, "weight")]
    assert said["nonzeros"] == sum(int(weight.count_nonzero()) for weight in weights)
    assert said["file_bytes"] == out.stat().st_size and list(said["latency"]) == ["1", "2"]
    ok("evaluate", saved, "--no-latency", *data)
    assert found()["accuracy"] == said["accuracy"]
    text = ok("evaluate", out, "--no-latency")
    assert "right" not in text and "images per s" not in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "a:b"], "needs neither --model nor --input"),
        (["--input", "3x12x12"], "needs neither --model nor --input"),
        (["--data", "synthetic", "--size", 16], "does not take these images: input must be"),
    ],
)
def test_an_engine_takes_what_it_was_compiled_for(words, says, tmp_path):
    compiled(small_net(), (3, 8, 8)).save(tmp_path / "net.engine")
    done = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path / "net.engine"), *map(str, words)])
    assert done.exit_code == 2 and says in " ".join(done.output.split())


def test_the_kind_of_a_file_is_told_without_reading_it(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"1234567", b"\xff" * 40, (20).to_bytes(8, "little") + b"x" * 20):
        path.write_bytes(content)
        assert kind_of(path) is None
    compiled(small_net(), (3, 8, 8)).save(path)
    assert kind_of(path) is ENGINE
    dass.save(dass.zoo.create("resnet20", width=0.25), path)
    assert kind_of(path) is MODEL
