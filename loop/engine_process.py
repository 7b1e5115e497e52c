"""The command line and environment of a vLLM that we start ourselves: the managed engine and the examination's."""

from __future__ import annotations

import sys
from pathlib import Path

from loop.settings import LINEAR_LAYERS, EngineSettings

HOST = "127.0.0.1"
MAX_BATCHED_TOKENS = 2048


def engine_command(
    settings: EngineSettings, base_dir: Path, base_name: str, port: int, chat_template: Path | None = None
) -> list[str]:
    """The API key is not on it: every user of the machine can read a command line. `chat_template`: a project's own."""
    loras = str(settings.max_loras)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(base_dir.resolve())),
        *("--served-model-name", base_name, "--host", HOST, "--port", str(port)),
        *("--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len)),
        *("--max-num-seqs", str(settings.max_num_seqs)),
        *("--enable-lora", "--max-loras", loras, "--max-cpu-loras", loras),
        *("--max-lora-rank", str(settings.max_lora_rank), "--max-logprobs", "20"),
    ]
    if chat_template is not None:
        command += ["--chat-template", str(chat_template.resolve())]
    if settings.device == "cpu":
        command += _for_cpu(settings)
    if settings.sleep_mode:
        command.append("--enable-sleep-mode")
    return [*command, *settings.extra_args]


def _for_cpu(settings: EngineSettings) -> list[str]:
    """Without the list of modules lm_head is wrapped too, and concurrent prompt log-probabilities kill the server."""
    return [
        "--enforce-eager",
        *("--max-num-batched-tokens", str(max(MAX_BATCHED_TOKENS, settings.max_model_len))),
        *("--lora-target-modules", *LINEAR_LAYERS),
        *("--worker-extension-cls", "loop.vllm_cpu_worker.BaseRows"),
    ]


def engine_environment(settings: EngineSettings) -> dict[str, str]:
    """To add to a minimal environment (PATH, HOME ...). Offline; runtime loading on; our key, where there is one."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    }
    if settings.api_key is not None:
        environment["VLLM_API_KEY"] = settings.api_key.get_secret_value()
    if settings.sleep_mode:
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # without it, sleep mode has no HTTP endpoints
    if settings.device == "cpu":
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(settings.threads),
        }
    return environment
