"""The line for each engine, after the published recipes. Nothing is started, and no line was run here.

Sources: serving spec 2.7 (effort), 3.5 (parsers), 6.2 to 6.6 (recipes). Where they disagree, or where something was
only inferred, the note says so.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable

from nanoglm.errors import InputError
from nanoglm.launch.line import PARSERS, Launch, drafts_of, gpus_of, in_ram, pattern_of, platform_of, room
from nanoglm.launch.llama import llama
from nanoglm.launch.pattern import starting
from nanoglm.launch.target import Target, Wish
from nanoglm.plan import plan

ACTIVATIONS = 3e9  # bytes of vLLM's share; with it FP8 on 8 x 141 GB holds the half million tokens of spec 6.1


def launch(engine: str, target: Target, wish: Wish | None = None) -> Launch:
    """What to type to serve ``target`` with one of :data:`ENGINES`.

    Raises:
        InputError: an engine that is not one of them, or a wish that the engine or the checkpoint cannot meet.
    """
    if engine not in ENGINES:
        raise InputError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    if target.found.format == "gguf" and engine not in ("llama.cpp", "ollama"):
        raise InputError(f"model {target.name!r} is a GGUF file; expected a checkpoint directory for {engine}")
    out = Launch()
    if target.unsaved and engine != "ollama":
        out.run("python", "-c", f'import nanoglm; nanoglm.load("{target.name}").save("{target.name}")')
        out.note(f"preset {target.name} has random weights: the first line saves them")
    ENGINES[engine](target, wish or Wish(), out)
    return out


def _vllm(target: Target, wish: Wish, out: Launch) -> None:
    kind, gpus, platform = target.found.format, gpus_of(target, wish), platform_of(target, wish, out)
    drafts = drafts_of(target, wish, None, out)
    cap, share = target.config.max_position_embeddings, 0.9  # vLLM's default share of memory
    if platform == "amd":
        out.lines += ["export VLLM_ROCM_USE_AITER=1", "export VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=1"]
        cap, share = (32_768, 0.9) if kind == "mxfp4" else (524_288, 0.8)
    if kind == "mxfp4":
        out.lines += ["export VLLM_USE_V2_MODEL_RUNNER=1"]
        out.lines += ["export VLLM_ROCM_USE_AITER_FP8BMM=0", "export VLLM_ROCM_USE_AITER_FP4BMM=0"]
    if platform == "blackwell" and kind == "fp8":
        out.lines.append("export VLLM_DEEP_GEMM_WARMUP=skip")
    cache = wish.kv_cache or "fp8"
    length = room(
        target, wish, out, gpus=gpus, each=target.weights / gpus, cache=cache, mtp=drafts > 0, share=share, cap=cap,
        activations=ACTIVATIONS,
    )  # fmt: skip
    words = starting("vllm", target.name, pattern_of(target, out))
    words += ["--tensor-parallel-size", str(gpus), *PARSERS, "--enable-auto-tool-choice"]
    words += ["--kv-cache-dtype", "bfloat16" if cache == "bf16" else "fp8" if platform == "hopper" else "fp8_e4m3"]
    words += ["--max-model-len", str(length)]
    if drafts:
        words += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": drafts})]
    if kind == "mxfp4":
        words += ["--trust-remote-code", "--no-enable-prefix-caching"]
    elif platform == "amd":
        words += ["--linear-backend", "aiter", "--moe-backend", "aiter", "--gpu-memory-utilization", "0.80"]
    if kind != "mxfp4" and (platform == "amd" or kind == "fp8" and platform == "blackwell"):
        words += ["--max-num-seqs", "32"]
    if kind == "nvfp4":
        words.append("--enable-expert-parallel")
    out.serve(words, wish)
    deep = "; FP8 needs DeepGEMM" if kind == "fp8" and platform != "amd" else ""
    out.note(
        f"needs vLLM >= 0.23.0 and transformers >= 5.9.0{deep}; for tools together with MTP take current main (the "
        "docker tag glm52 is older than the parser)",
        'effort: "low" means Max on an unpatched vLLM, as everything but "high" does; send "chat_template_kwargs": '
        '{"reasoning_effort": "high"}, or {"enable_thinking": false}',
        "leave --chat-template-content-format on auto: string would flatten tool_reference parts (INFERRED)",
    )
    if platform == "hopper":
        out.note("cache: the recipe takes fp8 on H200, bf16 on H20; SGLang takes bf16 on Hopper by itself (CONFLICT)")
    if drafts:
        out.note(
            "drafts: fewer if acceptance falls well below them, none for many requests at once (CONFLICT in the "
            "recipe: up to 5, up to 7; 7 is for the external DSpark drafter)"
        )
    if kind == "w4afp8":
        out.note("WARNING: W4AFP8 is SGLang's format; vLLM's counterpart is W4A8 in compressed-tensors")
    if kind == "mxfp4":
        out.note("--trust-remote-code is the recipe's: Python files of the checkpoint would run")


def _sglang(target: Target, wish: Wish, out: Launch) -> None:
    gpus, platform = gpus_of(target, wish), platform_of(target, wish, out)
    drafts = drafts_of(target, wish, 0 if platform == "amd" else None, out)
    cache = wish.kv_cache or ("fp8" if platform == "blackwell" else "bf16")
    length = room(
        target, wish, out, gpus=gpus, each=target.weights / gpus, cache=cache, mtp=drafts > 0, share=0.8,
        cap=target.config.max_position_embeddings,
    )  # fmt: skip
    words = starting("sglang", target.name, pattern_of(target, out))
    words += ["--tp-size", str(gpus), *PARSERS, "--mem-fraction-static", "0.8", "--context-length", str(length)]
    if wish.kv_cache:
        words += ["--kv-cache-dtype", "bfloat16" if cache == "bf16" else "fp8_e4m3"]
    if drafts:
        words += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(drafts)]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(drafts + 1)]
    if platform == "amd":
        words += ["--dsa-prefill-backend", "tilelang", "--dsa-decode-backend", "tilelang"]
        words += ["--chunked-prefill-size", "131072", "--watchdog-timeout", "1200"]
    out.serve(words, wish)
    out.note(
        "needs SGLang >= 0.5.13.post1; its tool parser glm45 does not parse GLM-5.2",
        'effort: Max, unless "chat_template_kwargs" is {"reasoning_effort": "high"} or {"enable_thinking": false}',
        "--mem-fraction-static 0.8 is where to start: raise it while requests still find room",
    )
    if platform == "amd":
        out.note("drafts: SGLang's cookbook keeps MTP off on AMD, vLLM recommends it (CONFLICT)")
        out.note("cache: bf16 on AMD is INFERRED")
    else:
        out.note(
            "many users: --chunked-prefill-size 32768 --max-running-requests 80, 1 draft; most throughput: no drafts"
        )
    if platform == "hopper":
        out.note(
            "cache: by itself SGLang takes bf16 on Hopper, vLLM's recipe fp8 (CONFLICT)",
            f"long prompts: --attn-cp-size {gpus} --enable-dsa-prefill-context-parallel --dsa-prefill-cp-mode "
            "round-robin-split (first token of 64K 2.5 to 2.8 times sooner, smaller cache)",
        )


def _ktransformers(target: Target, wish: Wish, out: Launch) -> None:
    config, kind, gpus = target.config, target.found.format, gpus_of(target, wish)
    method = {"fp8": "FP8", "bf16": "BF16", "int4": "RAWINT4"}.get(kind)
    if method is None:
        raise InputError(f"model {target.name!r} has weights in {kind}; expected fp8, bf16 or int4 for ktransformers")
    if wish.drafts:
        raise InputError(f"drafts is {wish.drafts}; expected 0, the recipe for ktransformers has no MTP")
    layers = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
    parameters = layers * config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size
    routed = target.weights * parameters / plan(config, 1)["parameters"]["total"]
    experts = min(8 if gpus < 8 else 10 if kind == "bf16" else 30, config.n_routed_experts)
    # Long prompts stream one layer's experts through the GPU (quantisation spec 3).
    held = target.weights - routed + routed * experts / config.n_routed_experts + routed / max(layers, 1)
    cache = wish.kv_cache or ("bf16" if kind == "bf16" else "fp8")
    length = room(
        target, wish, out, gpus=gpus, each=held / gpus, cache=cache, mtp=False, share=0.97,
        cap=262_144 if wish.memory else 4096,
    )  # fmt: skip
    in_ram(out, wish, routed, "routed experts")
    folder = out.directory(target)
    out.lines += ["export SGLANG_ENABLE_JIT_DEEPGEMM=0", "export PYTORCH_ALLOC_CONF=expandable_segments:True"]
    words = starting("sglang", folder, pattern_of(target, out))
    words += ["--kt-method", method, "--kt-weight-path", folder, "--kt-cpuinfer", "96", "--kt-threadpool-count", "2"]
    words += ["--kt-num-gpu-experts", str(experts), "--kt-gpu-prefill-token-threshold", "1024"]
    words += ["--kt-enable-dynamic-expert-update", "--kt-expert-placement-strategy", "uniform"]
    words += ["--tp-size", str(gpus), "--mem-fraction-static", "0.97"]
    words += ["--kv-cache-dtype", "fp8_e4m3"] if cache == "fp8" else []
    words += ["--context-length", str(length), "--max-total-tokens", str(length), "--max-running-requests", "8"]
    words += ["--attention-backend", "nsa", *(["--fp8-gemm-backend", "cutlass"] if kind == "fp8" else [])]
    out.serve([*words, "--disable-shared-experts-fusion", *PARSERS], wish)
    out.note(
        "needs sglang-kt, kt-kernel and transformers 5.3.0; no MTP in its recipe",
        "--kt-cpuinfer: the machine's cores, --kt-threadpool-count: its NUMA nodes; 96 and 2 are the recipe's",
        "GPU experts: the recipe has 30 for FP8 and 10 for BF16 on 8 GPUs, a user 8 on one of 96 GB; fewer if memory "
        "runs out",
    )
    if kind == "int4":
        out.note("RAWINT4 is INFERRED for GLM: the recipe has FP8 and BF16")


def _ollama(target: Target, wish: Wish, out: Launch) -> None:
    out.note(
        "Ollama runs no GLM-5.2 locally: it has parsers and renderers for GLM-4.6 and 4.7 only, and no runner for "
        "glm-dsa (a community import of GLM-5 needed a patched build)",
        "hosted, not your checkpoint and not on your machine: ollama run glm-5.2:cloud",
        f"local instead, the same API: nanoglm launch llama.cpp {shlex.quote(target.model)}",
    )


ENGINES: dict[str, Callable[[Target, Wish, Launch], None]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": llama,
    "ktransformers": _ktransformers,
    "ollama": _ollama,
}
