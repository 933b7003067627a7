"""Lines for other engines: exact flags by checkpoint, what a shell makes of them, and what fits."""

from __future__ import annotations

import json
import shlex
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

import nanoglm
from nanoglm.cli import main
from nanoglm.config import GLMConfig
from nanoglm.errors import CheckpointError, InputError, NanoglmError
from nanoglm.indexcache.apply import launch_lines
from nanoglm.launch import Wish, launch, published, target
from nanoglm.plan import served_cache
from nanoglm.weights import save
from nanoglm.weights.gguf import read_gguf

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
MILLION = 1_048_576
LISTEN = "--host 127.0.0.1 --port 8000"
PARSERS = "--tool-call-parser glm47 --reasoning-parser glm45"


def checkpoint(
    folder: Path, quantised: Any = FP8, total: int | None = 755_617_140_416, *, mtp: bool = True, **changes: Any
) -> Path:
    """config.json and index file, as a directory holds them before its shards are downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = GLMConfig.preset("glm-5.2", **changes).to_dict()
    (folder / "config.json").write_text(json.dumps(raw | ({"quantization_config": quantised} if quantised else {})))
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"]
    names += [f"model.layers.{raw['num_hidden_layers']}.eh_proj.weight"] if mtp else []
    index = {"metadata": {"total_size": total} if total else {}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], list[str]]:
    """Lines and notes that the command prints."""
    main(["launch", *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    notes = [line for line in lines if line.startswith("# ")]
    assert lines == [*lines[: len(lines) - len(notes)], *notes]
    return lines[: len(lines) - len(notes)], notes


def noted(notes: list[str], *words: str) -> bool:
    """Whether one note has them all."""
    return any(all(word in note for word in words) for note in notes)


# ------------------------------------------------------------------------------- exact lines
def test_vllm_fp8_on_eight_h200(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "GLM-5.2-FP8")
    lines, notes = run(capsys, "vllm", str(folder), "--gpus", "8", "--memory", "141GB", "--length", "500000")
    assert lines == [
        f"vllm serve {folder} --tensor-parallel-size 8 {PARSERS} --enable-auto-tool-choice --kv-cache-dtype fp8 "
        '--max-model-len 500000 --speculative-config \'{"method": "mtp", "num_speculative_tokens": 5}\' ' + LISTEN
    ]
    assert noted(notes, "94.5 GB of weights (755.6 GB of fp8 by the index)", "27.4 GB of cache", "54,728 bytes")
    assert noted(notes, "latent cache is replicated on all 8 GPUs under tensor parallelism", "DP attention")
    assert noted(notes, '"low" means Max', "chat_template_kwargs") and noted(notes, "DeepGEMM", ">= 0.23.0")
    assert noted(notes, "INFERRED") and noted(notes, "cache:", "CONFLICT") and noted(notes, "drafts:", "CONFLICT")


def test_sglang_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "fp8")
    start = f"python -m sglang.launch_server --model-path {folder} --tp-size 8 {PARSERS} --mem-fraction-static 0.8 "
    drafts = "--speculative-algorithm EAGLE --speculative-num-steps {} --speculative-eagle-topk 1 "
    drafts += "--speculative-num-draft-tokens {} "
    lines, notes = run(capsys, "sglang", str(folder), "--memory", "141GB", "--length", "131072")
    assert lines == [start + "--context-length 131072 " + drafts.format(5, 6) + LISTEN]
    assert noted(notes, "93,912 bytes, bf16", "12.3 GB of cache") and noted(notes, "fits:", "80% of 141.0 GB")
    lines, notes = run(
        capsys, "sglang", str(folder), "--length", "4096", "--drafts", "1", "--kv-cache", "fp8", "--port", "30000"
    )
    assert lines == [
        start + "--context-length 4096 --kv-cache-dtype fp8_e4m3 " + drafts.format(1, 2) + LISTEN[:-4] + "30000"
    ]
    lines, notes = run(capsys, "sglang", str(folder), "--length", "4096", "--platform", "amd")
    assert "--dsa-prefill-backend tilelang --dsa-decode-backend tilelang --chunked-prefill-size 131072" in lines[0]
    assert "--speculative" not in lines[0] and noted(notes, "AMD", "MTP", "CONFLICT")


def test_vllm_on_amd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "fp8")
    lines, notes = run(capsys, "vllm", str(folder), "--platform", "amd", "--memory", "192GB")
    assert lines == [
        "export VLLM_ROCM_USE_AITER=1",
        "export VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=1",
        f"vllm serve {folder} --tensor-parallel-size 8 {PARSERS} --enable-auto-tool-choice --kv-cache-dtype fp8_e4m3 "
        '--max-model-len 524288 --speculative-config \'{"method": "mtp", "num_speculative_tokens": 5}\' '
        "--linear-backend aiter --moe-backend aiter --gpu-memory-utilization 0.80 --max-num-seqs 32 " + LISTEN,
    ]
    assert noted(notes, "fits:", "80% of 192.0 GB")


def test_mxfp4_goes_to_amd_and_nvfp4_to_blackwell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quark = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}}}
    lines, notes = run(capsys, "vllm", str(checkpoint(tmp_path / "mx", quark, 440 * 10**9)), "--drafts", "0")
    assert lines[2:5] == [
        "export VLLM_USE_V2_MODEL_RUNNER=1",
        "export VLLM_ROCM_USE_AITER_FP8BMM=0",
        "export VLLM_ROCM_USE_AITER_FP4BMM=0",
    ]
    assert lines[5].endswith(f"--max-model-len 32768 --trust-remote-code --no-enable-prefix-caching {LISTEN}")
    assert "aiter" not in lines[5] and "speculative" not in lines[5]
    modelopt = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    folder = checkpoint(tmp_path / "nv", modelopt, 465 * 10**9)
    lines, notes = run(capsys, "vllm", str(folder), "--drafts", "0")
    assert lines[0].endswith(
        f"--kv-cache-dtype fp8_e4m3 --max-model-len {MILLION} --enable-expert-parallel {LISTEN}"
    ) and not noted(notes, "WARNING")
    _, notes = run(capsys, "vllm", str(folder), "--platform", "hopper")
    assert noted(notes, "WARNING", "nvfp4", "blackwell, not for hopper")


def test_fp8_on_blackwell(capsys: pytest.CaptureFixture[str]) -> None:
    lines, notes = run(capsys, "vllm", "glm-5.2", "--platform", "blackwell", "--memory", "180GB")
    assert lines[0] == "export VLLM_DEEP_GEMM_WARMUP=skip" and "--max-num-seqs 32" in lines[1]
    assert f"--kv-cache-dtype fp8_e4m3 --max-model-len {MILLION}" in lines[1] and noted(notes, "fits:")  # spec 6.2


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    lines, notes = run(capsys, "vllm", "glm-5.2")
    assert lines[0].startswith("vllm serve zai-org/GLM-5.2-FP8 --tensor-parallel-size 8 ")
    assert noted(notes, "755.6 GB of fp8 by the configuration") and not noted(notes, "WARNING")
    lines, notes = run(capsys, "vllm", "glm-5.2", "--format", "bf16", "--memory", "141GB")
    assert lines[0].startswith("vllm serve zai-org/GLM-5.2 ") and noted(notes, "WARNING", "weights alone are 188.3 of")
    lines, _ = run(capsys, "vllm", "glm-5", "--drafts", "3")
    assert lines[0].startswith("vllm serve zai-org/GLM-5-FP8 ") and "hf-overrides" not in lines[0]
    assert run(capsys, "vllm", "glm-5")[0] == lines  # three drafts where no layer shares its indices
    lines, notes = run(capsys, "vllm", "nano")
    assert lines[0] == 'python -c \'import nanoglm; nanoglm.load("nano").save("nano")\''
    assert lines[1].startswith("vllm serve nano --hf-overrides ") and "--tensor-parallel-size 1 " in lines[1]
    lines, notes = run(capsys, "sglang", "recall")
    assert "speculative" not in lines[1] and noted(notes, "no MTP layer")


def test_a_checkpoint_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nanoglm.load("tiny")
    model.save(tmp_path / "with")
    model.save(tmp_path / "without", mtp=False)
    for engine in ("vllm", "sglang", "ktransformers", "llama.cpp"):
        lines, notes = run(capsys, engine, str(tmp_path / "with"), "--memory", "12GB", "--ram", "8GB")
        assert str(tmp_path / "with") in lines[-1 if engine != "llama.cpp" else 0] and noted(notes, "fits:")
        assert not noted(notes, "no MTP layer")
    assert "speculative-config" in run(capsys, "vllm", str(tmp_path / "with"))[0][0]
    lines, notes = run(capsys, "vllm", str(tmp_path / "without"))
    assert "speculative" not in lines[0] and noted(notes, "no MTP layer")
    size = (tmp_path / "with" / "model.safetensors").stat().st_size
    assert (target(str(tmp_path / "with")).weights, target(str(tmp_path / "with")).source) == (size, "in files")


def test_shards_are_counted_as_they_lie(tmp_path: Path) -> None:
    save(nanoglm.load("tiny").module, tmp_path, shard_bytes=100_000)
    shards = list(tmp_path.glob("model-*.safetensors"))
    (tmp_path / "shared_indexers.safetensors").touch()  # ours, and no engine's
    found = published(tmp_path)
    assert len(shards) > 2 and found.nbytes == sum(file.stat().st_size for file in shards)
    assert (found.source, found.mtp, found.unnamed) == ("in files", True, ())
    shards[0].unlink()
    assert published(tmp_path).source == "by the index"


# ------------------------------------------------------------------------------- MTP
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_no_drafts_without_the_layers_tensors(
    tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    folder = checkpoint(tmp_path / "fp8", mtp=False)
    lines, notes = run(capsys, engine, str(folder))
    assert "speculative" not in lines[0]
    assert noted(notes, "no MTP layer: no tensors model.layers.78.*", "config.json announces one", "draft noise")
    assert refused(capsys, engine, str(folder), "--drafts", "5") == (
        f"drafts is 5; expected 0, {str(folder)!r} has no MTP layer (model.layers.78.*)"
    )
    run(capsys, engine, str(folder), "--drafts", "0")
    (folder / "mtp.safetensors").touch()  # the index forgot it: 0.1 % acceptance (spec 4.6)
    (folder / "a.safetensors").touch()
    assert noted(run(capsys, engine, str(folder))[1], "does not name mtp.safetensors:", "mend the index")


def test_config_alone_says_that_nobody_looked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "fp8")
    (folder / "model.safetensors.index.json").unlink()
    lines, notes = run(capsys, "vllm", str(folder))
    assert '"num_speculative_tokens": 5' in lines[0] and noted(notes, "MTP: no index file", "model.layers.78.*")
    assert noted(notes, "755.6 GB of fp8 by the configuration")


# ------------------------------------------------------------------------------- patterns
def test_a_searched_pattern_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pattern, keys in (
        ("FFSF" + "S" * 73 + "F", {"index_topk_pattern": "FFSF" + "S" * 73 + "F"}),
        ("FS" * 39, {"index_topk_freq": 2, "index_skip_topk_offset": 1}),
    ):
        types = ["full" if letter == "F" else "shared" for letter in pattern]
        config = {"indexer_types": types, "index_topk_freq": None, "index_skip_topk_offset": None}
        folder = checkpoint(tmp_path / pattern[:4], **config)
        for engine, option in (("vllm", "--hf-overrides"), ("sglang", "--json-model-override-args")):
            lines, notes = run(capsys, engine, str(folder))
            words = shlex.split(lines[0])
            assert json.loads(words[words.index(option) + 1]) == {"use_index_cache": True} | keys
            assert noted(notes, f"pattern {pattern}", "CONFLICT")
            applied = launch_lines(folder, GLMConfig.from_file(folder))[{"vllm": "vLLM", "sglang": "SGLang"}[engine]]
            assert lines[0].startswith(applied + " ")
    for engine in ("vllm", "sglang", "ktransformers"):  # GLM-5.2's own is not
        assert "index" not in "".join(run(capsys, engine, str(checkpoint(tmp_path / "own")))[0])


def test_what_apply_prints_is_what_it_printed() -> None:
    config = GLMConfig.preset("nano")
    assert launch_lines(Path("runs/applied"), config) == {
        "vLLM": "vllm serve runs/applied --hf-overrides "
        '\'{"use_index_cache": true, "index_topk_freq": 4, "index_skip_topk_offset": 2}\'',
        "SGLang": "python -m sglang.launch_server --model-path runs/applied --json-model-override-args "
        '\'{"use_index_cache": true, "index_topk_freq": 4, "index_skip_topk_offset": 2}\'',
        "transformers": 'AutoModelForCausalLM.from_pretrained("runs/applied")  # 5.23.0 reads indexer_types',
    }


# ------------------------------------------------------------------------------- shells
ODD = [
    "a b",
    "it's",
    'say "x"',
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "new\nline\ntouch pwned",
    "ü€",
    "-rf",
]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp", "ktransformers", "ollama"])
def test_odd_paths_survive_a_shell(
    tmp_path: Path, name: str, engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / name)
    model = name if name.startswith("-") else str(tmp_path / name)
    # As the command, but tyro takes -rf for options.
    text = str(launch(engine, target(model), Wish(api_key_env="KEY")))
    found = shell(text, tmp_path)
    expected = f"./{name}" if name.startswith("-") else model
    assert not (tmp_path / "pwned").exists()
    assert found == [] if engine == "ollama" else expected in found[0]
    if engine != "ollama":
        lines = [line for line in text.split("\n") if not line.startswith(("# ", "export"))]
        words = [word.replace("${KEY:?}", "se cret") for word in shlex.split("\n".join(lines))]
        assert [word for call in found for word in call] == words


def shell(text: str, folder: Path) -> list[list[str]]:
    """The words of each command that bash would run; those of other programs are not taken and fail."""
    stub = "for n in vllm python llama-server hf; do eval \"$n() { printf '%s\\0' $n \\\"\\$@\\\" $'\\n'; }\"; done\n"
    done = subprocess.run(
        ["bash", "-eu", "-c", stub + text], cwd=folder, env={"KEY": "se cret"}, capture_output=True, check=True
    )
    assert done.stderr == b""
    calls = done.stdout.decode().split("\0\n\0")
    return [call.split("\0") for call in calls if call]


def test_what_a_checkpoint_says_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "x", {"quant_method": "x\ntouch pwned\n\x1b[2J\u2028"})
    text = str(launch("vllm", target(str(folder))))
    assert len(shell(text, tmp_path)) == 1 and not (tmp_path / "pwned").exists() and "\x1b" not in text


def test_a_key_must_be_set(tmp_path: Path) -> None:
    text = str(launch("sglang", target("tiny"), Wish(api_key_env="NO_SUCH_KEY", host="0.0.0.0")))
    assert text.splitlines()[1].endswith('--host 0.0.0.0 --port 8000 --api-key "${NO_SUCH_KEY:?}"')
    with pytest.raises(subprocess.CalledProcessError):
        shell(text, tmp_path)
    assert "WARNING: whoever reaches 0.0.0.0" in str(launch("sglang", target("tiny"), Wish(host="0.0.0.0")))


# ------------------------------------------------------------------------------- memory
def test_bytes_per_token_are_the_engines() -> None:
    """Serving spec 6.1: 79 layers, 22 indexers."""
    config = GLMConfig.preset("glm-5.2")
    index = 22 * 132
    assert served_cache(config, "bf16", True) == 79 * 1152 + index and 79 * 1152 == 91_008
    assert served_cache(config, "fp8", True) == 79 * 656 + index and 79 * 656 == 51_824
    assert round(79 * 656 * MILLION / 1e9, 1) == 54.3 and served_cache(config, "fp8", False) == 78 * 656 + 21 * 132
    assert served_cache(config, "q8_0", False) == 78 * 612 + 21 * 256


@pytest.mark.parametrize(
    ("kind", "length", "fits"),
    [("fp8", MILLION, False), ("fp8", 500_000, True), ("int4", MILLION, True), ("bf16", 4096, False)],
)
def test_verdicts_on_eight_h200(kind: str, length: int, fits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["vllm", "glm-5.2", "--format", kind, "--gpus", "8", "--memory", "141GB", "--length", str(length)]
    _, notes = run(capsys, *arguments)
    assert noted(notes, "WARNING: does not fit") != fits and noted(notes, "# fits: ") == fits
    if fits:
        main(["launch", *arguments, "--strict"])
    else:
        with pytest.raises(SystemExit) as exit_:
            main(["launch", *arguments, "--strict"])
        assert exit_.value.code == 1
        assert capsys.readouterr().out.startswith("vllm serve ")
    if (kind, length) == ("fp8", MILLION):
        assert noted(notes, "151.8 of 123.9 GB", "at most 538,076 tokens")


def test_a_length_that_fits_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = run(capsys, "vllm", "glm-5.2", "--memory", "141GB", "--strict")
    assert "--max-model-len 537600 " in lines[0]
    lines, _ = run(capsys, "vllm", "glm-5.2", "--memory", "141GB", "--format", "int4", "--strict")
    assert f"--max-model-len {MILLION} " in lines[0]


# ------------------------------------------------------------------------------- KTransformers and Ollama
def test_ktransformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "fp8")
    lines, notes = run(capsys, "ktransformers", str(folder), "--gpus", "8", "--memory", "96GB", "--ram", "768GB")
    assert lines == [
        "export SGLANG_ENABLE_JIT_DEEPGEMM=0",
        "export PYTORCH_ALLOC_CONF=expandable_segments:True",
        f"python -m sglang.launch_server --model-path {folder} --kt-method FP8 --kt-weight-path {folder} "
        "--kt-cpuinfer 96 --kt-threadpool-count 2 --kt-num-gpu-experts 30 --kt-gpu-prefill-token-threshold 1024 "
        "--kt-enable-dynamic-expert-update --kt-expert-placement-strategy uniform --tp-size 8 "
        "--mem-fraction-static 0.97 --kv-cache-dtype fp8_e4m3 "
        "--context-length 262144 --max-total-tokens 262144 --max-running-requests 8 "
        f"--attention-backend nsa --fp8-gemm-backend cutlass --disable-shared-experts-fusion {PARSERS} {LISTEN}",
    ]
    assert noted(notes, "RAM: 727.0 of 768.0 GB") and noted(notes, "fits:", "97% of 96.0 GB")
    lines, notes = run(capsys, "ktransformers", str(folder), "--gpus", "1", "--ram", "512GB")
    assert "--kt-num-gpu-experts 8 " in lines[2] and "--max-total-tokens 4096 " in lines[2]
    assert noted(notes, "WARNING: does not fit in RAM: 727.0 of 512.0 GB")
    bf16 = checkpoint(tmp_path / "bf16", None, 1_506_659_919_872)
    lines, _ = run(capsys, "ktransformers", str(bf16))
    assert "--kt-method BF16 " in lines[2] and "--kt-num-gpu-experts 10 " in lines[2] and "fp8" not in lines[2]
    packed = checkpoint(
        tmp_path / "int4", {"quant_method": "compressed-tensors", "format": "pack-quantized"}, 405 * 10**9
    )
    lines, notes = run(capsys, "ktransformers", str(packed))
    assert "--kt-method RAWINT4 " in lines[2] and noted(notes, "RAWINT4", "INFERRED")
    lines, _ = run(capsys, "ktransformers", "glm-5.2")
    assert lines[0] == "hf download zai-org/GLM-5.2-FP8 --local-dir GLM-5.2-FP8"
    assert "--model-path GLM-5.2-FP8 --kt-method FP8 --kt-weight-path GLM-5.2-FP8 " in lines[3]


def test_ollama_is_told_apart_from_what_it_hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "a b")
    lines, notes = run(capsys, "ollama", str(folder), "--strict")
    assert lines == [] and noted(notes, "no GLM-5.2 locally") and noted(notes, "glm-5.2:cloud", "hosted")
    assert noted(notes, f"nanoglm launch llama.cpp '{folder}'")


# ------------------------------------------------------------------------------- llama.cpp
def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(
    file: Path, sizes: dict[str, int], *, layers: int = 79, nextn: int = 1, architecture: str = "glm-dsa", **more: Any
) -> Path:
    """A GGUF file of so many bytes a tensor (multiples of 32), sparse on the disk."""
    keys = {
        "block_count": layers, "nextn_predict_layers": nextn, "context_length": MILLION, "leading_dense_block_count": 3,
        "attention.kv_lora_rank": 512, "rope.dimension_count": 64, "attention.indexer.key_length": 128,
    } | more  # fmt: skip
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text(architecture)]
    pairs.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("bc") + text(""))
    for name, value in keys.items():
        if isinstance(value, list):
            packed = struct.pack(f"<IIQ{len(value)}?", 9, 7, len(value), *value)
        else:
            packed = struct.pack("<II", 4, value)
        pairs.append(text(f"glm-dsa.{name}") + packed)
    header, at = b"GGUF" + struct.pack("<IQQ", 3, len(sizes), len(pairs)) + b"".join(pairs), 0
    for name, size in sizes.items():
        header += text(name) + struct.pack("<IQQIQ", 2, 32, size // 32, 24, at)
        at += size
    header += bytes(-len(header) % 32)
    with file.open("wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + at)
    return file


GB = 10**9


def model_sizes(mtp: bool = True) -> dict[str, int]:
    """18 GB that every token needs; 75 layers of experts of 3 GB."""
    sizes = {"token_embd.weight": 8 * GB, "blk.0.attn_q_a.weight": 10 * GB}
    for layer in range(3, 78):
        sizes |= {f"blk.{layer}.ffn_{part}_exps.weight": GB for part in ("gate", "up", "down")}
    return sizes | ({"blk.78.nextn.eh_proj.weight": 32} if mtp else {})


def test_llama_with_all_on_the_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = gguf(tmp_path / "q2.gguf", model_sizes())
    lines, notes = run(capsys, "llama.cpp", str(file), "--gpus", "4", "--memory", "80GB")
    assert lines == [
        f"llama-server -m {file} --jinja -c 131072 -ngl 999 -fa on -ctk q8_0 -ctv q8_0 --temp 1.0 --top-p 0.95 "
        '--chat-template-kwargs \'{"reasoning_effort": "high"}\' --spec-type draft-mtp --spec-draft-n-max 3 ' + LISTEN
    ]
    assert noted(notes, "243.0 GB of weights (225.0 GB of them routed experts)") and noted(notes, "# fits: ")
    assert noted(notes, "drafts:", "CONFLICT") and not noted(notes, "trap")
    lines, _ = run(capsys, "llama.cpp", str(file), "--gpus", "4", "--memory", "80GB", "--drafts", "0")
    assert "--spec" not in lines[0]


def test_llama_with_experts_in_ram(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(gguf(tmp_path / "q2.gguf", model_sizes()))
    lines, notes = run(capsys, "llama.cpp", file)
    assert " -ngl 999 --cpu-moe " in lines[0] and "--spec" not in lines[0] and noted(notes, "RAM: 225.0 GB")
    # 0.9 x 80 - 18 - 4,096 tokens = 53.8 GB: 17 layers of 3 GB, the last of 75 that begin with layer 3.
    lines, notes = run(capsys, "llama.cpp", file, "--memory", "80GB", "--length", "4096", "--ram", "256GB", "--strict")
    assert " --n-cpu-moe 61 " in lines[0] and noted(notes, "51.0 GB of experts in 72.0 GB")
    assert noted(notes, "RAM: 174.0 of 256.0 GB") and noted(notes, "trap", "--n-cpu-moe", "-ot")
    lines, notes = run(capsys, "llama.cpp", file, "--memory", "80GB", "--gpus", "2", "--ram", "200GB")
    assert " --cpu-moe " in lines[0] and noted(notes, "trap", "several GPUs", "-ot")
    assert noted(notes, "WARNING: does not fit in RAM: 225.0 of 200.0 GB")
    lines, _ = run(capsys, "llama.cpp", file, "--gpus", "0", "--ram", "256GB", "--drafts", "2")
    assert " -ngl 0 -fa on " in lines[0] and "--spec-draft-n-max 2" in lines[0]
    with pytest.raises(SystemExit) as exit_:
        main(["launch", "llama.cpp", file, "--memory", "12GB", "--strict"])
    assert exit_.value.code == 1 and "WARNING: does not fit: 25." in capsys.readouterr().out


def test_llama_needs_a_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "fp8")
    lines, notes = run(capsys, "llama.cpp", str(folder), "--ram", "1TB")
    assert lines[0] == f"python convert_hf_to_gguf.py {folder} --outfile fp8-q8_0.gguf --outtype q8_0"
    assert lines[1].startswith("llama-server -m fp8-q8_0.gguf --jinja ") and noted(notes, "convert first")
    assert noted(notes, "800.4 GB of weights")  # 753.3 B at 8.5 bits
    lines, _ = run(capsys, "llama.cpp", "glm-5.2")
    assert lines[0] == "hf download zai-org/GLM-5.2-FP8 --local-dir GLM-5.2-FP8"


def test_a_gguf_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = gguf(tmp_path / "a.gguf", model_sizes(mtp=False))
    lines, notes = run(capsys, "llama.cpp", str(without), "--gpus", "8", "--memory", "80GB")
    assert "--spec" not in lines[0] and noted(notes, "no MTP layer")
    assert "has no MTP layer" in refused(capsys, "llama.cpp", str(without), "--drafts", "3")
    types = [layer % 2 == 0 for layer in range(78)]
    found = published(gguf(tmp_path / "b.gguf", model_sizes(), **{"attention.indexer.types": types}))
    assert found.config.pattern == "FS" * 39 and found.mtp and found.experts[0] == (3, 3 * GB)
    assert noted(run(capsys, "llama.cpp", str(tmp_path / "b.gguf"))[1], "pattern", "indexer.types")
    assert published(without).config.pattern == GLMConfig.preset("glm-5.2").pattern
    early = gguf(tmp_path / "c.gguf", model_sizes(), context_length=202_752)
    assert set(published(early).config.pattern) == {"F"}
    old = gguf(tmp_path / "d.gguf", {}, architecture="llama")
    assert "general.architecture 'llama'; expected 'glm-dsa'" in refused(capsys, "llama.cpp", str(old))
    assert "GGUF file; expected a checkpoint directory" in refused(capsys, "vllm", str(without))


def test_a_split_gguf_is_one(tmp_path: Path) -> None:
    sizes = list(model_sizes().items())
    for part in range(3):
        gguf(tmp_path / f"m-{part + 1:05d}-of-00003.gguf", dict(sizes[part::3]))
    found = published(tmp_path / "m-00001-of-00003.gguf")
    assert found.mtp and sum(n for _, n in found.experts) == 225 * GB and 243 * GB < (found.nbytes or 0) < 243.1 * GB
    with pytest.raises(CheckpointError, match="is part 2; expected the first"):
        read_gguf(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match="00003-of-00003.gguf cannot be read"):
        read_gguf(tmp_path / "m-00001-of-00003.gguf")


def test_a_damaged_gguf_is_one_sentence(tmp_path: Path) -> None:
    good = gguf(tmp_path / "good.gguf", {"blk.3.ffn_up_exps.weight": 64, "output.weight": 32}).read_bytes()
    file = tmp_path / "bad.gguf"
    assert sum(read_gguf(tmp_path / "good.gguf").sizes.values()) == 96
    for length in range(len(good) - 96):
        file.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_gguf(file)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0))
    with pytest.raises(CheckpointError, match="1152921504606846976 tensors"):
        read_gguf(file)
    for at in range(len(good) - 96):
        file.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        try:
            published(file)
        except NanoglmError as error:
            assert "\n" not in str(error)


# ------------------------------------------------------------------------------- formats and mistakes
@pytest.mark.parametrize(
    ("quantised", "kind"),
    [
        (None, "bf16"),
        (FP8, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt_fp4"}, "nvfp4"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}, "mxfp4"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "quark", "layer_quant_config": {"*": {"weight": {"dtype": "fp4"}}}}, "mxfp4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "int4"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
            },
            "int8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"a": {"format": "nvfp4-pack-quantized"}, "b": {"format": "float-quantized"}},
            },
            "nvfp4",
        ),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "auto-round", "bits": 4}, "int4"),
        ({"quant_method": "w4afp8"}, "w4afp8"),
        ({"quant_method": "exl3"}, "exl3"),
    ],
)
def test_formats(tmp_path: Path, quantised: Any, kind: str) -> None:
    assert published(checkpoint(tmp_path, quantised)).format == kind


def test_modelopt_keeps_its_own_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, None)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    assert published(folder).format == "nvfp4"
    (folder / "hf_quant_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="hf_quant_config.json is damaged"):
        published(folder)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that the command ends with, exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        main(["launch", *arguments])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and err.count("\n") == 1
    return err.removeprefix("nanoglm: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("tgi glm-5.2", "engine is 'tgi'; expected one of vllm, sglang, llama.cpp, ktransformers, ollama"),
        ("vllm nowhere", "model 'nowhere' is neither"),
        ("vllm EMPTY", "config.json cannot be read"),
        ("ollama EMPTY", "config.json cannot be read"),
        ("vllm glm-5.2 --gpus 0", "gpus is 0; expected a number that divides num_attention_heads (64)"),
        ("vllm glm-5.2 --gpus 7", "gpus is 7; expected a number that divides"),
        ("llama.cpp glm-5.2 --gpus -1", "gpus is -1; expected 0 to 4096"),
        ("vllm glm-5.2 --memory 141", "memory is '141'; expected a size such as 12GB"),
        ("vllm glm-5.2 --length 0", "length is 0; expected 1 to"),
        ("vllm glm-5.2 --length 1048577", "length is 1048577; expected at most max_position_embeddings (1048576)"),
        ("llama.cpp glm-5.2 --length 1048577", "expected at most max_position_embeddings"),
        ("vllm glm-5.2 --drafts 17", "drafts is 17; expected 0 to 16"),
        ("vllm recall --drafts 1", "drafts is 1; expected 0, 'recall' has no MTP layer"),
        ("ktransformers glm-5.2 --drafts 1", "drafts is 1; expected 0"),
        ("vllm glm-5.2 --port 65536", "port is 65536; expected 1 to 65535"),
        ("vllm glm-5.2 --api-key-env a;b", "api-key-env is 'a;b'; expected the name of an environment variable"),
        ("vllm glm-5 --format int4", "format is 'int4'; expected bf16, nothing else is published for preset 'glm-5'"),
        ("vllm FP8 --format fp8", "format is 'fp8'; expected none beside"),
        ("vllm NVFP4", "weights in nvfp4 and neither files nor total_size"),
        ("ktransformers NVFP4-SIZED", "weights in nvfp4; expected fp8, bf16 or int4 for ktransformers"),
        ("llama.cpp glm-5.2 --kv-cache fp8", "kv-cache is 'fp8'; expected bf16 or none (q8_0) for llama.cpp"),
        ("vllm glm-5.2 --strict", "strict has nothing to check; expected memory"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "EMPTY").mkdir()
    checkpoint(tmp_path / "FP8")
    checkpoint(tmp_path / "NVFP4", {"quant_method": "modelopt_fp4"}, None)
    checkpoint(tmp_path / "NVFP4-SIZED", {"quant_method": "modelopt_fp4"})
    words = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in arguments.split()]
    assert sentence in refused(capsys, *words)


def test_a_path_that_cannot_be_printed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        target(str(tmp_path / "\udcff"))
