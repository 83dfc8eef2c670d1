"""Export to ONNX and torch.export: the same outputs, zeros and sizes, and what is refused."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from pruned_net import Net, batch
from torch import nn
from typer.testing import CliRunner

import dass
from dass import cli, exporting, onnx_files
from dass.exporting import ExportError

try:
    import onnx
    import onnxscript  # noqa: F401
    from onnx import numpy_helper
except ImportError:
    onnx = None

needs_onnx = pytest.mark.skipif(
    onnx is None, reason="the extra export (onnx, onnxscript) is absent"
)
ONNX = [pytest.param("onnx", marks=needs_onnx), pytest.param("onnx-sparse", marks=needs_onnx)]
FORMATS = [*ONNX, "torch"]


def pruned(sparsity=0.9):
    torch.manual_seed(0)
    model = Net()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
    dass.prune(model, sparsity)
    return model.eval()


@pytest.fixture
def blind(monkeypatch):
    """A Python without the extra."""
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("fold", [False, True], ids=["", "fold"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_computes_what_the_model_does_at_any_batch_size(tmp_path, format, fold):
    model, (x, _) = pruned().train(), batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = dass.export(model, tmp_path / "net", x[:1], format, fold=fold)
    assert model.training  # and nothing learned
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert report.verified_batches == (1, 3) and report.error < 1e-5
    assert report.file_bytes == os.path.getsize(tmp_path / "net")
    want = model.eval()(x)
    data = (tmp_path / "net").read_bytes()
    if format == "torch":
        got = torch.export.load(io.BytesIO(data)).module()(x)
    else:
        by, ((got,),) = onnx_files.run(data, [[x]])
        assert by == report.verified_by
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_does_not_say_where_it_was_made(tmp_path, format):
    dass.export(pruned(), tmp_path / "net", batch()[0], format)
    data = (tmp_path / "net").read_bytes()
    assert os.path.dirname(os.path.abspath(dass.__file__)).encode() not in data
    assert b"stack_trace" not in data


@pytest.mark.parametrize("format", FORMATS)
def test_the_report_has_every_layer_its_zeros_and_a_note(tmp_path, format):
    model = pruned()
    report = dass.export(model, tmp_path / "net", batch()[0], format)
    rows = {row.names[0]: row for row in report.layers}
    assert list(rows) == ["stem", "block.2", "block.3", "fc"]
    assert rows["block.3"].names == ("block.3", "again")
    for name, row in rows.items():
        layer = model.get_submodule(name)
        assert row.shape == tuple(layer.weight.shape)
        assert row.zeros == pytest.approx(1 - layer.density)
        assert row.stored == ("sparse" if format == "onnx-sparse" else "dense")
        assert 0 < row.bytes < 4 * layer.weight.numel() + 100
        assert ("torch" if format == "torch" else "ONNX Runtime") in row.note
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["names"] == ["stem"]
    assert "0 of 1 BatchNorms" in str(report) and "block.3 = again" in str(report)


@needs_onnx
def test_sparse_initialisers_come_back_as_the_dense_tensors(tmp_path):
    model = pruned(0.95)
    sizes = {}
    for format in ("onnx", "onnx-sparse"):
        dass.export(model, tmp_path / format, batch()[0], format)
        sizes[format] = os.path.getsize(tmp_path / format)
    dense, sparse = (onnx.load(tmp_path / format) for format in sizes)
    assert sizes["onnx-sparse"] < 0.7 * sizes["onnx"]
    assert {entry.values.name for entry in sparse.graph.sparse_initializer} >= {"stem.weight"}
    for entry in sparse.graph.sparse_initializer:
        indices = numpy_helper.to_array(entry.indices)
        assert indices.dtype == np.int64 and (np.diff(indices) > 0).all()
    again = onnx_files.dense_initializers(sparse)
    assert not again.graph.sparse_initializer
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in again.graph.initializer}
    assert found.keys() == {tensor.name for tensor in dense.graph.initializer}
    for tensor in dense.graph.initializer:
        want = numpy_helper.to_array(tensor)
        assert found[tensor.name].dtype == want.dtype
        assert np.array_equal(found[tensor.name], want)
    assert np.array_equal(found["stem.weight"], dass.densify(model).stem.weight.detach())


@needs_onnx
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_sparse_initialisers_keep_dtypes_and_an_empty_layer(dtype):
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)).to(dtype)
    net[0].weight.data[:, 1:] = 0
    net[1].weight.data.zero_()
    program = torch.export.export(net, (torch.ones(2, 32, dtype=dtype),))
    model = onnx_files.to_onnx(program, 18, None)
    want = onnx_files.initializers(model)
    onnx_files.sparse_initializers(model)
    got = onnx_files.initializers(model)
    assert got["0.weight"][0] == got["1.weight"][0] == "sparse"
    assert got["1.weight"][1] < 100
    for name, (_, _, array) in want.items():
        assert got[name][2].dtype == array.dtype and np.array_equal(got[name][2], array)


@needs_onnx
def test_weights_with_few_zeros_stay_dense(tmp_path):
    report = dass.export(pruned(0.5), tmp_path / "net", batch()[0], "onnx-sparse")
    assert {row.stored for row in report.layers} == {"dense"}
    assert not onnx.load(tmp_path / "net").graph.sparse_initializer


@needs_onnx
@pytest.mark.parametrize("opset", [18, 20])
def test_the_opset_is_the_one_asked_for(tmp_path, opset):
    report = dass.export(pruned(), tmp_path / "net", batch()[0], opset=opset)
    model = onnx.load(tmp_path / "net")
    assert report.opset == opset and [entry.version for entry in model.opset_import] == [opset]
    assert model.ir_version <= 9
    assert [value.name for value in model.graph.input] == ["input"]


@needs_onnx
@pytest.mark.parametrize("fold", [False, True])
def test_batchnorm_is_folded_only_if_asked(tmp_path, fold):
    report = dass.export(pruned(), tmp_path / "net", batch()[0], fold=fold)
    kinds = [node.op_type for node in onnx.load(tmp_path / "net").graph.node]
    assert kinds.count("BatchNormalization") == (0 if fold else 1)
    assert (report.norms, report.folded) == (1, int(fold))


@needs_onnx
def test_a_linear_layer_of_sequences_is_found_transposed(tmp_path):
    net = nn.Linear(24, 16)
    net.weight.data[:, 1:] = 0
    report = dass.export(net, tmp_path / "net", torch.randn(2, 5, 24), "onnx-sparse")
    (row,) = report.layers
    assert row.stored == "sparse" and row.names == ("",)
    assert report.error < 1e-5


class Two(nn.Module):
    """Two inputs, two outputs, the second input without a batch."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x, scale):
        y = self.fc(x) * scale
        return {"y": y, "top": y.argmax(1)}


@pytest.mark.parametrize("format", FORMATS)
def test_several_inputs_by_name_and_a_fixed_batch(tmp_path, format):
    example = {"x": torch.randn(4, 6), "scale": torch.rand(5)}
    report = dass.export(Two(), tmp_path / "net", example, format)
    assert report.dynamic_batch and report.verified_batches == (4, 1, 5)
    report = dass.export(Two(), tmp_path / "net", example, format, dynamic_batch=False)
    assert report.verified_batches == (4,) and "for batches of 4" in str(report)
    with pytest.raises(ValueError, match="one input"):
        dass.export(Two(), tmp_path / "net", example, format, fold=True)


class OneSize(nn.Module):
    def forward(self, x):
        return x.reshape(4, 6).sum(1)


@pytest.mark.parametrize("format", FORMATS)
def test_a_network_for_one_batch_size_is_refused_or_fixed(tmp_path, format):
    with pytest.raises((ExportError, RuntimeError)):
        dass.export(OneSize(), tmp_path / "net", torch.randn(4, 6), format)
    assert not list(tmp_path.iterdir())
    dass.export(OneSize(), tmp_path / "net", torch.randn(4, 6), format, dynamic_batch=False)


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_a_network_that_cannot_be_followed_is_refused(tmp_path):
    with pytest.raises(ExportError, match="cannot follow this network"):
        dass.export(Branches(), tmp_path / "net", torch.randn(4, 6), "torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch, format):
    (tmp_path / "net").write_text("old")

    def wrong(model, **kwargs):
        plain = dass.densify(model, **kwargs)
        plain.fc.weight.data.mul_(1.01)
        return plain

    monkeypatch.setattr(exporting, "densify", wrong)
    with pytest.raises(ExportError, match="something else"):
        dass.export(pruned(), tmp_path / "net", batch()[0], format)
    assert (tmp_path / "net").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"format": "tflite"}, "format must be one of onnx, onnx-sparse, torch"),
        ({"opset": 13}, "opset must be 18 or later, got 13"),
        ({"example_inputs": 3}, "must be tensors"),
        ({"example_inputs": ()}, "must be tensors"),
        ({"example_inputs": torch.tensor(1.0)}, "no batch"),
        ({"example_inputs": torch.ones(1, 3, 6, 6, dtype=torch.bfloat16)}, "bfloat16"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, says):
    with pytest.raises(ValueError, match=says):
        dass.export(Net(), tmp_path / "net", **{"example_inputs": batch()[0], **arguments})


def test_without_the_extra_the_error_says_what_to_install(tmp_path, blind):
    with pytest.raises(ImportError, match=r"pip install dass\[export\]"):
        dass.export(pruned(), tmp_path / "net", batch()[0])
    assert dass.export(pruned(), tmp_path / "net", batch()[0], "torch").opset is None


def test_dass_alone_does_not_import_onnx():
    code = "import dass, sys; dass.export; assert not {'onnx', 'onnxscript'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "r20.safetensors"
    model = dass.zoo.create("resnet20", width=0.25)
    dass.prune(model, 0.9)
    dass.save(model, path)
    return path


def dass_(*words):
    done = CliRunner().invoke(cli.app, ["export", *map(str, words)])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("format", FORMATS)
def test_the_command_writes_the_file_beside_the_network(saved, format):
    code, said = dass_(saved, "--to", format, "--size", 16, "--fold")
    assert code == 0, said
    assert saved.with_suffix(".pt2" if format == "torch" else ".onnx").exists()
    assert "19 of 19 BatchNorms folded" in said and "layer3.2.conv2" in said


def test_the_command_names_what_is_wrong(saved, tmp_path, blind):
    out = tmp_path / "net.onnx"
    for words, says in [
        (["--to", "coreml"], "format must be one of"),
        (["--to", "torch", "--batch", 0], "--batch must be at least 1"),
        (["--to", "torch", "--input", "4x8x8"], "does not take an input of that shape"),
        (["--to", "torch", "-o", saved], "is the network itself"),
        (["--to", "onnx"], "pip install dass[export]"),
    ]:
        code, said = dass_(saved, "-o", out, *words)
        assert code == 2 and says in said, said
    assert not out.exists()
