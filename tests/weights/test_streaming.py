"""Reading in little memory, one layer at a time; saving that a kill cannot break."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from weights.sparse import sparse_checkpoint

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.weights import Checkpoint, checkpoint_tensors, save

LIMIT = 450_000_000  # bytes resident, of a process in which torch alone takes about 310 MB


@pytest.fixture(scope="module")
def model() -> GLM:
    return GLM(GLMConfig.preset("tiny")).initialise(1)


def test_one_layer_by_itself(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path, dtype=torch.float32, shard_bytes=200_000)
    checkpoint = Checkpoint(tmp_path)
    for i in range(5):  # the last is the MTP layer
        layer, whole = checkpoint.layer(i), model.model.layers[i]
        assert type(layer) is type(whole)
        assert all(torch.equal(layer.state_dict()[n], t) for n, t in whole.state_dict().items())
    with pytest.raises(InputError, match="layer is 5; expected 0 to 3, or 4 for the MTP layer"):
        checkpoint.layer(5)
    save(model, tmp_path / "main", mtp=False)
    with pytest.raises(InputError, match=r"has no MTP layer; expected tensors model\.layers\.4\.\*"):
        Checkpoint(tmp_path / "main").layer(4)


def test_some_layers_the_others_on_meta(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path, dtype=torch.float32)
    part, _ = Checkpoint(tmp_path).load(layers=[0, 2])
    for name, value in part.state_dict().items():
        absent = name.startswith(("model.layers.1.", "model.layers.3.", "model.layers.4."))
        assert value.is_meta == absent
        assert absent or torch.equal(value, model.state_dict()[name])


def test_a_checkpoint_four_times_the_memory_loads_layer_by_layer(tmp_path: Path) -> None:
    """Three shards, 1.9 GB; the process may hold 450 MB."""
    config = GLMConfig.preset("tiny").replace(
        num_hidden_layers=28, indexer_types=("full", "shared") * 14, mlp_layer_types=("dense",) + ("sparse",) * 27,
        hidden_size=1024, moe_intermediate_size=1024, n_routed_experts=10, intermediate_size=2048,
        num_nextn_predict_layers=0, vocab_size=4096,
    )  # fmt: skip
    with torch.device("meta"):
        tensors = {n: ("BF16", tuple(t.shape)) for n, t in checkpoint_tensors(GLM(config)).items()}
    total = sparse_checkpoint(tmp_path, config, tensors, 3)
    assert total >= 4 * LIMIT
    script = textwrap.dedent(f"""
        import resource, sys, torch
        from nanoglm.weights import Checkpoint
        # The limit itself: no more private memory than this. Mapped files are checked by the peak below.
        resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT}))
        checkpoint = Checkpoint(sys.argv[1])
        values = 0
        for i in range(28):
            layer = checkpoint.layer(i, dtype=torch.bfloat16)
            values += sum(p.numel() for p in layer.parameters())
            del layer  # before the next one comes
        rest, _ = checkpoint.load(dtype=torch.bfloat16, layers=())
        # Not ru_maxrss, which begins with what the parent held.
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(values, int(peak.split()[1]) * 1024)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values, peak = map(int, done.stdout.split())
    print(f"\n{total / 1e9:.2f} GB on disk, peak {peak / 1e6:.0f} MB")
    assert values > 0.98 * total / 2
    assert peak <= LIMIT


KILLED = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from nanoglm.config import GLMConfig
from nanoglm.model import GLM
from nanoglm.weights import Checkpoint, save

target, times = Path(sys.argv[1]), int(sys.argv[2])
base = GLMConfig.preset("tiny")
models = []  # two architectures: half of one and half of the other would not load, or hold other values
for width, value in ((32, 1.0), (48, 2.0)):
    model = GLM(base.replace(moe_intermediate_size=width)).initialise()
    for p in model.parameters():
        p.data.fill_(value)
    models.append(model)
save(models[0], target, shard_bytes=100_000)
(target / "notes.txt").write_text("mine")
moment = 0.05  # seconds before the kill at most; follows how long a save takes just now
before, replaced = {1.0}, 0
trial = killed = 0
while killed < times and trial < 10 * times:
    trial += 1
    child = os.fork()
    if not child:
        save(models[(trial + 1) % 2], target, shard_bytes=100_000)
        os._exit(0)
    time.sleep(random.Random(trial).uniform(0, moment))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    loaded, _ = Checkpoint(target).load()  # fails unless every name and shape fits
    values = {float(v) for p in loaded.parameters() for v in p.unique()}
    assert values == ({1.0} if loaded.config.moe_intermediate_size == 32 else {2.0}), (trial, values)
    assert (target / "notes.txt").read_text() == "mine"
    replaced += values != before
    before = values
    killed += os.WIFSIGNALED(status)
    moment *= 1.1 if os.WIFSIGNALED(status) else 0.9
print(killed, trial - killed, replaced)
"""


def test_a_kill_during_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    """50 times ``kill -9`` at random moments."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "x"), "50"], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, finished, replaced = map(int, done.stdout.split())
    print(f"\n{killed} saves killed, {finished} came first; {replaced} times another model stood there than before")
    assert killed == 50 and replaced >= 5
