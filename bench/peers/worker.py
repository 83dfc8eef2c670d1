"""One runtime in a process of its own, timed on command; imports numpy and that runtime alone.

    python -m bench.peers.worker JOB

JOB is JSON: runtime (a key of RUNTIMES), entry (which way of it), model, input, output (paths, the
latter two .npy), threads, cpus (the numbers of those it may run on). The worker loads, runs once,
writes the output and says ``{"ready": true, ...}``. Then it answers lines of stdin with a line of
JSON each, and ends with stdin:

    time N      {"times_ns": [...]}, one for each of N inferences, after warm-up, monotonic clock
    memory      {"peak": bytes, "now": bytes}, resident

An error is answered with ``{"error": "..."}`` and ends it. Nothing else reaches its stdout: what
the runtimes print goes to stderr.
"""

import gc
import json
import os
import sys
import time


class Loaded:
    """A model that is ready to run.

    run: one inference on the input it was loaded with; this is timed.
    read: makes a numpy array of what run returned.
    facts: version, and the precision as the runtime names it.
    """

    def __init__(self, run, read, **facts):
        self.run, self.read, self.facts = run, read, facts


def _onnxruntime(job, x):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
    session = onnxruntime.InferenceSession(
        job["model"], options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x}
    return Loaded(
        lambda: session.run(None, feed),
        lambda result: result[0],
        version=onnxruntime.__version__,
        precision="fp32",
    )


def _openvino(job, x):
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": job["entry"],
        "INFERENCE_NUM_THREADS": job["threads"],
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # the process is pinned
    }
    compiled = openvino.Core().compile_model(job["model"], "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != job["entry"]:
        raise RuntimeError(f"OpenVINO computes in {used} where {job['entry']} was asked for")
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    return Loaded(
        request.infer,
        lambda result: request.get_output_tensor().data,
        version=openvino.__version__.split("-")[0],
        precision={"f32": "fp32"}.get(used, used),
    )


def _deepsparse(job, x):
    from deepsparse.engine import Engine
    from deepsparse.version import __version__ as version

    engine = Engine(model=job["model"], batch_size=len(x), num_cores=job["threads"])
    return Loaded(
        lambda: engine.run([x], val_inp=False),
        lambda result: result[0],
        version=version,
        precision="fp32",
    )


def _mnn(job, x):
    import MNN
    from MNN import expr, nn

    settings = {"backend": "CPU", "numThread": job["threads"], "precision": "high"}
    runtime = nn.create_runtime_manager((settings,))
    network = nn.load_module_from_file(
        job["model"], ["input"], ["output"], runtime_manager=runtime, shape_mutable=False
    )
    image = expr.const(x, list(x.shape), expr.NCHW)
    return Loaded(
        lambda: network.forward([image])[0].read(),
        lambda result: result,
        version=MNN.version(),
        precision="fp32",
    )


def _torch(job, x):
    import torch

    from bench.peers import entries

    torch.set_num_threads(job["threads"])
    example = torch.from_numpy(x)
    call = entries.load(job["entry"], job["model"], example)
    mode = torch.inference_mode()
    mode.__enter__()  # until the process ends
    return Loaded(
        call,
        lambda result: result.numpy(),
        version=entries.version(job["entry"]),
        precision="fp32",
    )


def _engine(job, x):
    """Of a file: nothing is captured, tuned or measured in this process."""
    import torch

    import dass

    torch.set_num_threads(job["threads"])
    engine, example = dass.load_engine(job["model"]), torch.from_numpy(x)
    return Loaded(
        lambda: engine(example),
        lambda result: result.numpy(),
        version=dass.__version__,
        precision=engine.precision,
    )


RUNTIMES = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "deepsparse": _deepsparse,
    "mnn": _mnn,
    "torch": _torch,
    "engine": _engine,
}


def time_inferences(run, count):
    """Nanoseconds of each of `count` calls. A tenth as many before, at least 2, are not timed."""
    clock, times = time.perf_counter_ns, []
    for _ in range(max(2, count // 10)):
        run()
    for _ in range(count):
        start = clock()
        run()
        times.append(clock() - start)
    return times


def memory():
    """Resident bytes, at most so far and now. On other systems than Linux only the former."""
    found = {}
    try:
        with open("/proc/self/status") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name in ("VmHWM", "VmRSS"):
                    found[{"VmHWM": "peak", "VmRSS": "now"}[name]] = 1024 * int(value.split()[0])
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["peak"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def answer(line, run):
    """What to reply to a command. ValueError: there is no such command."""
    command, _, argument = line.strip().partition(" ")
    if command == "time" and argument.isdigit():
        return {"times_ns": time_inferences(run, int(argument))}
    if command == "memory":
        return memory()
    raise ValueError(f"unknown command {line.strip()!r}")


def main(job):
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(reply):
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, job["cpus"])
        import numpy as np

        image = np.load(job["input"])  # kept here to the end: a runtime may read it where it lies
        start = time.perf_counter()
        loaded = RUNTIMES[job["runtime"]](job, image)
        result = loaded.read(loaded.run())
        seconds = time.perf_counter() - start
        np.save(job["output"], np.asarray(result))
        say({"ready": True, "load_seconds": seconds, "numpy": np.__version__, **loaded.facts})
        gc.collect()
        gc.disable()
        for line in sys.stdin:
            say(answer(line, loaded.run))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
