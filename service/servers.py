"""How each managed server is started and when it is ready: vLLM, Label Studio, MLflow; offline, on 127.0.0.1 only."""

from __future__ import annotations

import ipaddress
import secrets
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from pydantic import SecretStr

from labeling.settings import LabelStudioSettings
from loop.engine_process import engine_command, engine_environment
from loop.settings import EngineSettings
from service.children import Child, ServerFailed
from service.secret_files import kept_secret

HOST = "127.0.0.1"
# Where a managed Label Studio reaches our webhook: an address of this machine that nothing else listens on, the only
# local one that its users can make it call (the other managed servers listen on HOST, which stays forbidden).
HOOK_HOST = "127.83.78.1"
# Alone on two cores the first starts, which make databases, take 36 s and 7 s; beside a training run ten times that.
# One that ends is noticed at once; this is for one that hangs.
START_SECONDS = 600.0
CHECK_SECONDS = 5.0


@dataclass(frozen=True)
class Server:
    """One managed server: a command that answers GET `health` with 200 once it works."""

    name: str
    url: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    folder: Path
    health: str
    start_seconds: float
    cure: str

    def start(self, log_dir: Path) -> Child:
        self.folder.mkdir(parents=True, exist_ok=True)
        return Child.start(
            self.name,
            self.command,
            environment=self.environment,
            cwd=self.folder,
            log_path=log_dir.resolve() / f"{self.name}.log",
        )

    async def wait_ready(self, child: Child) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=CHECK_SECONDS, trust_env=False) as client:

            async def answers() -> bool:
                try:
                    return (await client.get(self.health)).status_code == httpx.codes.OK
                except httpx.TransportError:
                    return False

            await child.wait_ready(answers, self.start_seconds, self.cure)


@dataclass(frozen=True)
class LabelStudioLogin:
    """Of the managed server's first user. Label Studio takes it at its first start only, so it is kept from then on."""

    username: str
    password: str = field(repr=False)
    token: str = field(repr=False)
    secret_key: str = field(repr=False)

    @classmethod
    def kept(cls, settings: LabelStudioSettings, folder: Path) -> LabelStudioLogin:
        """In files of `folder`; what the settings do not give is random."""

        def value(name: str, given: SecretStr | None) -> str:
            return kept_secret(folder / f"label_studio_{name}", given.get_secret_value() if given else _random())

        return cls(
            username=kept_secret(folder / "label_studio_username", settings.username),
            password=value("password", settings.password),
            token=value("token", settings.token),
            secret_key=value("secret_key", None),
        )


def vllm(
    settings: EngineSettings, base_dir: Path, base_name: str, port: int, folder: Path, chat_template: Path | None = None
) -> Server:
    return Server(
        name="vllm",
        url=f"http://{HOST}:{port}",
        command=tuple(engine_command(settings, base_dir, base_name, port, chat_template)),
        environment=engine_environment(settings),
        folder=folder,
        health="/health",
        start_seconds=settings.start_timeout_seconds,
        cure="Check [vllm] and base_dir; with a slow disk or processor raise vllm.start_timeout_seconds.",
    )


def label_studio(settings: LabelStudioSettings, login: LabelStudioLogin, port: int, folder: Path) -> Server:
    """The login travels in the environment: every user of the machine can read a command line."""
    url = f"http://{HOST}:{port}"
    environment = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_HOST": url,
        "LABEL_STUDIO_USERNAME": login.username,
        "LABEL_STUDIO_PASSWORD": login.password,
        "LABEL_STUDIO_USER_TOKEN": login.token,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "SECRET_KEY": login.secret_key,
        "DJANGO_DB": "sqlite",
        "DEBUG": "false",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "FEATURE_FLAGS_OFFLINE": "true",
        "SSRF_PROTECTION_ENABLED": "true",
        "USE_DEFAULT_BANNED_SUBNETS": "false",
        "USER_ADDITIONAL_BANNED_SUBNETS": ",".join(banned_subnets()),
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "USE_NLTK": "0",
    }
    command = (label_studio_command(settings), "start", "--no-browser", "--data-dir", str(folder))
    address = ("--internal-host", HOST, "--port", str(port))
    return Server(
        name="label-studio",
        url=url,
        command=(*command, *address, "--enable-legacy-api-token", "--log-level", "WARNING"),
        environment=environment,
        folder=folder,
        health="/health",
        start_seconds=START_SECONDS,
        cure="Run `make setup` again if its environment is broken; its data lie in label-studio/ of the data_dir.",
    )


# Label Studio's own defaults (core/utils/io.py), which can only be replaced as a whole, less the loopback network.
_BANNED = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24
192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 233.252.0.0/24 240.0.0.0/4 255.255.255.255/32
::/128 ::1/128 ::ffff:0:0/96 ::ffff:0:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 2001:0000::/32 2001:20::/28
2001:db8::/32 2002::/16 fc00::/7 fe80::/10 ff00::/8
"""


def banned_subnets() -> list[str]:
    """What Label Studio must not call for its users: everything that is not public, but for our webhook."""
    loopback = ipaddress.ip_network("127.0.0.0/8")
    others = loopback.address_exclude(ipaddress.ip_network(f"{HOOK_HOST}/32"))  # type: ignore[arg-type]  # both IPv4
    return [*_BANNED.split(), *map(str, others)]


def mlflow(port: int, folder: Path) -> Server:
    store = ("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--serve-artifacts")
    return Server(
        name="mlflow",
        url=f"http://{HOST}:{port}",
        command=(
            *(sys.executable, "-m", "mlflow", "server", *store, "--artifacts-destination", str(folder / "artifacts")),
            *("--host", HOST, "--port", str(port), "--workers", "1"),
        ),
        environment={
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "GIT_PYTHON_REFRESH": "quiet",
        },
        folder=folder,
        health="/health",
        start_seconds=START_SECONDS,
        cure="Install the extra nightschool[registry-server], or give [mlflow] the url of an existing server.",
    )


def label_studio_command(settings: LabelStudioSettings) -> str:
    """The configured one, or that of .venv-label-studio beside our environment or the checkout, or the one on PATH."""
    if settings.command:
        return settings.command
    beside = (Path(sys.prefix).parent, Path(__file__).resolve().parent.parent)
    for folder in beside:
        found = folder / ".venv-label-studio" / "bin" / "label-studio"
        if found.exists():
            return str(found)
    on_path = shutil.which("label-studio")
    if on_path is None:
        raise ServerFailed(
            "label-studio is not installed",
            hint="Run `make setup`, or name the executable in label_studio.command, or give the url of a server.",
        )
    return on_path


def free_ports(count: int) -> list[int]:
    """All held at the same time, so that they differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _random() -> str:
    return secrets.token_hex(20)
