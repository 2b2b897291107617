"""The Ray Serve application: replicas around `http.create_app`, and the watch for the next night."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus

from recray.config import Settings, load_settings
from recray.errors import ClusterError, SettingsError
from recray.inference.memory import keep_freed_memory
from recray.serving.deployment import first_state
from recray.serving.guard import KEYS_VARIABLE, Keys, check
from recray.serving.http import create_app
from recray.serving.service import Service
from recray.serving.telemetry import RayTelemetry
from recray.serving.traces import SECRET, VARIABLES, provider
from recray.storage import Storage

NAME = "recray"
SWITCH_S = 0.0005  # the model's thread asks for the interpreter between all its operations; at 5 ms it waits for requests that are refused
STOP_S = 90.0  # Serve itself gives its replicas a minute
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@serve.ingress()
class Endpoint:
    """One replica."""

    def __init__(self, settings: Settings) -> None:
        import torch

        torch.set_num_threads(1)
        keep_freed_memory()
        sys.setswitchinterval(SWITCH_S)
        options: dict[str, Any] = {"private": settings.privacy.enabled, "policy": settings.policy, "exclude_users": settings.data.exclude_users}
        self.service = Service(Storage(settings.root()), settings.serve, settings.score, RayTelemetry(), **options)
        threading.Thread(target=self._watch, args=(settings.serve.poll_s,), daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.service)

    def _watch(self, poll_s: float) -> None:
        wait = threading.Event()
        while not wait.wait(poll_s):
            try:
                self.service.look()
            except Exception as error:  # whatever it is, it must be looked again
                logging.getLogger("ray.serve").error("the watch failed once: %s", type(error).__name__)

    def __del__(self) -> None:
        self.service.close()


def build(settings: Settings) -> Any:
    """The application of these settings, to run or to deploy."""
    options = settings.serve
    # replicas have Ray's environment, not ours
    ours = {name: value for name, value in os.environ.items() if name == KEYS_VARIABLE or (name.startswith(VARIABLES) and SECRET not in name)}
    deployment: Any = serve.deployment(
        Endpoint,
        num_replicas=options.replicas,
        max_ongoing_requests=options.max_ongoing_requests,
        # Serve counts a burst as queued before any of it begins, so there must be room for all that HAProxy lets in
        max_queued_requests=options.places,
        backpressure_config={"retry_after_s": 1},
        ray_actor_options={"num_cpus": 0.1, "num_gpus": options.gpus_per_replica} | ({"runtime_env": {"env_vars": ours}} if ours else {}),
    )
    return deployment.bind(settings)


class Arguments(BaseModel):
    """What `serve deploy` passes: a settings file on every node, and overrides."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = None
    overrides: list[str] = []


def deploy(arguments: Arguments) -> Any:
    """The application of a Serve config file (infra/serve/recray.yaml). Raises SettingsError, MissingArtifactError."""
    settings = load_settings(arguments.config, arguments.overrides)
    _ready(settings)
    return build(settings)


def _ready(settings: Settings) -> Keys:
    """What would keep a replica from starting is said here: a clear error beats a deployment that never becomes healthy.

    Raises MissingArtifactError, DamagedArtifactError, SettingsError.
    """
    keys = check(settings.serve)
    if settings.serve.traces:
        provider(settings.serve.traces).shutdown()  # type: ignore[union-attr]
    wanted = settings.serve.replicas * settings.serve.gpus_per_replica
    if ray.is_initialized() and wanted > (there := ray.cluster_resources().get("GPU", 0.0)):  # type: ignore[no-untyped-call]
        what = f"serve.replicas times serve.gpus_per_replica is {wanted:g}, the cluster has {there:g} GPUs"
        raise SettingsError(what, "lower serve.gpus_per_replica (0: answers on the CPU), or add a node with a GPU")
    nodes = sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1  # type: ignore[no-untyped-call]
    if settings.serve.state == "sqlite" and nodes > 1:
        raise SettingsError(f"serve.state=sqlite is for one machine, this cluster has {nodes}", "name a Redis: serve.state=redis://host:port/0")
    first_state(Storage(settings.root()), settings.score, logging.getLogger("ray.serve").error, private=settings.privacy.enabled)
    return keys


def start(settings: Settings) -> str:
    """Serve the published night and return the address. Needs a Ray session.

    Raises MissingArtifactError when no night is published, DamagedArtifactError, ClusterError, SettingsError.
    """
    log, options = logging.getLogger("ray.serve"), settings.serve
    if not _ready(settings).wanted and options.host not in LOOPBACK:
        log.warning("serve.host is %s and no keys are named: whoever reaches it may ask and tell what they like", options.host)
    log.setLevel(logging.WARNING)
    mine = False
    try:
        serve.start(http_options={"host": options.host, "port": options.port, "access_log": False})
        mine = NAME not in serve.status().applications
        serve.run(build(settings), name=NAME, route_prefix="/")
    except BaseException as error:  # a signal too: nothing half-started stays on the cluster
        if mine:
            with contextlib.suppress(ClusterError):
                stop()
        if not isinstance(error, RuntimeError | ValueError):
            raise
        raise ClusterError(f"the endpoint did not start: {error}", f"is port {options.port} free? else set serve.port") from error
    return f"http://{options.host}:{options.port}"


def stop() -> None:
    """Take the endpoint down; other applications of the cluster stay. Raises ClusterError."""
    failed: list[BaseException] = []

    def delete() -> None:
        try:
            serve.delete(NAME)
        except Exception as error:  # whatever it is, it is told
            failed.append(error)

    deleting = threading.Thread(target=delete, daemon=True)  # a controller that is away keeps whoever asks it waiting for ever
    deleting.start()
    deleting.join(STOP_S)
    if deleting.is_alive() or failed:
        why = str(failed[0]) if failed else f"no answer within {STOP_S:.0f} s"
        raise ClusterError(f"Ray Serve did not take the endpoint down: {why}", "look with: serve status")


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[str]:
    """The endpoint's address while it is up; afterwards it is down. Raises as `start` and `stop`."""
    address = start(settings)
    try:
        yield address
    except BaseException:
        with contextlib.suppress(ClusterError):  # what went wrong before is what is told
            stop()
        raise
    stop()


def alive() -> bool:
    """Whether a replica of the endpoint runs, or it is being deployed; it may take long where Serve's controller is away."""
    try:
        found = serve.status().applications.get(NAME)
    except (RuntimeError, TimeoutError, RayError):
        return False
    if found is None:
        return False
    running = any(state == "RUNNING" and count for deployment in found.deployments.values() for state, count in deployment.replica_states.items())
    return running or found.status == ApplicationStatus.DEPLOYING
