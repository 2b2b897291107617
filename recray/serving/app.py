"""The Ray Serve application: replicas around `http.create_app`, each with a watch for the next run."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus

from recray.config import Settings, load_settings
from recray.errors import ClusterError, SettingsError
from recray.inference.memory import keep_freed_memory
from recray.serving.deployment import load_first_state
from recray.serving.guard import KEYS_VARIABLE, Keys, load_keys
from recray.serving.http import create_app
from recray.serving.service import Service, check_surfaces
from recray.serving.telemetry import RayTelemetry
from recray.serving.traces import SECRET, VARIABLES, make_provider
from recray.storage import Storage

NAME = "recray"
# the model's thread needs the interpreter between all its operations; at the default of 5 ms it would wait
# for requests that are refused
SWITCH_S = 0.0005
ITEMS_S = 0.5  # between two checks of a replica for changes of items
UPSCALE_S, METRICS_S = 10.0, 2.0  # of load above the target, until more replicas start; between two reports
STOP_S = 90.0  # Serve gives its replicas a minute
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@serve.ingress()
class Endpoint:
    """One replica of the endpoint."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        sys.setswitchinterval(SWITCH_S)
        self.service = Service(
            Storage(settings.root()),
            settings.serve,
            settings.score,
            RayTelemetry(),
            private=settings.privacy.enabled,
            policy=settings.policy,
            exclude_users=settings.data.exclude_users,
        )
        for refresh, every_s in (
            (self.service.refresh, settings.serve.poll_s),
            (self.service.catalogue.refresh, ITEMS_S),  # which must not wait while a run is loaded
        ):
            threading.Thread(target=self._watch, args=(refresh, every_s), daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.service)

    def _watch(self, refresh: Callable[[], None], every_s: float) -> None:
        wait = threading.Event()
        while not wait.wait(every_s):
            try:
                refresh()
            except Exception as error:  # the watch must go on
                logging.getLogger("ray.serve").error("the watch failed, it retries: %s", type(error).__name__)

    def __del__(self) -> None:
        self.service.close()


def build_application(settings: Settings) -> Any:
    """The Serve application of these settings, to run or to deploy."""
    options = settings.serve
    # replicas have Ray's environment, not this process's
    variables = {
        name: value
        for name, value in os.environ.items()
        if name == KEYS_VARIABLE or (name.startswith(VARIABLES) and SECRET not in name)
    }
    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.max_ongoing_requests / 2,
                "upscale_delay_s": UPSCALE_S,
                "metrics_interval_s": METRICS_S,
                "look_back_period_s": UPSCALE_S,
            }
        }
    deployment: Any = serve.deployment(
        Endpoint,
        **scaling,
        max_ongoing_requests=options.max_ongoing_requests,
        # Serve counts a burst as queued before any of it starts, so there must be room for all requests that
        # HAProxy admits
        max_queued_requests=options.request_limit,
        backpressure_config={"retry_after_s": 1},
        ray_actor_options={"num_cpus": 0.1, "num_gpus": options.gpus_per_replica}
        | ({"runtime_env": {"env_vars": variables}} if variables else {}),
    )
    return deployment.bind(settings)


class Arguments(BaseModel):
    """Arguments of `serve deploy`: a settings file on every node, and overrides."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = None
    overrides: list[str] = []


def deploy(arguments: Arguments) -> Any:
    """The application of a Serve config file (infra/serve/recray.yaml). Raises SettingsError,
    MissingArtifactError.
    """
    settings = load_settings(arguments.config, arguments.overrides)
    _check_startup(settings)
    return build_application(settings)


def _check_startup(settings: Settings) -> Keys:
    """Find what would prevent a replica from starting: an error here is clearer than a deployment that never
    becomes healthy. Returns the API keys.

    Raises MissingArtifactError, DamagedArtifactError, SettingsError.
    """
    keys = load_keys(settings.serve)
    if settings.serve.traces:
        make_provider(settings.serve.traces).shutdown()  # type: ignore[union-attr]

    required = settings.serve.replicas * settings.serve.gpus_per_replica
    if ray.is_initialized() and required > (available := ray.cluster_resources().get("GPU", 0.0)):  # type: ignore[no-untyped-call]
        raise SettingsError(
            f"serve.replicas times serve.gpus_per_replica is {required:g}, the cluster has {available:g} "
            "GPUs",
            "lower serve.gpus_per_replica (0: serve from the CPU), or add a node with a GPU",
        )
    nodes = sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1  # type: ignore[no-untyped-call]
    if settings.serve.state == "sqlite" and nodes > 1:
        raise SettingsError(
            f"serve.state=sqlite is for one machine, this cluster has {nodes} nodes",
            "name a Redis: serve.state=redis://host:port/0",
        )
    state = load_first_state(
        Storage(settings.root()),
        settings.score,
        logging.getLogger("ray.serve").error,
        private=settings.privacy.enabled,
    )
    check_surfaces(settings.serve.surfaces, state)
    return keys


def start(settings: Settings) -> str:
    """Serve the published run and return the address. Needs a Ray session.

    Raises MissingArtifactError when no run is published, DamagedArtifactError, ClusterError, SettingsError.
    """
    log, options = logging.getLogger("ray.serve"), settings.serve
    if not _check_startup(settings).are_required and options.host not in LOOPBACK:
        log.warning(
            "serve.host is %s without API keys: anybody who reaches it may read and write", options.host
        )
    log.setLevel(logging.WARNING)
    is_new = False
    try:
        serve.start(http_options={"host": options.host, "port": options.port, "access_log": False})
        is_new = NAME not in serve.status().applications
        serve.run(build_application(settings), name=NAME, route_prefix="/")
    except BaseException as error:  # also a signal: nothing half-started stays on the cluster
        if is_new:
            with contextlib.suppress(ClusterError):
                stop()
        if not isinstance(error, RuntimeError | ValueError):
            raise
        raise ClusterError(
            f"the endpoint did not start: {error}", f"is port {options.port} free? else set serve.port"
        ) from error
    return f"http://{options.host}:{options.port}"


def stop() -> None:
    """Stop the endpoint; other applications of the cluster stay. Raises ClusterError."""
    errors: list[BaseException] = []

    def delete() -> None:
        try:
            serve.delete(NAME)
        except Exception as error:  # reported below
            errors.append(error)

    # an unavailable controller blocks its callers for ever
    thread = threading.Thread(target=delete, daemon=True)
    thread.start()
    thread.join(STOP_S)
    if thread.is_alive() or errors:
        reason = str(errors[0]) if errors else f"no response within {STOP_S:.0f} s"
        raise ClusterError(f"Ray Serve did not stop the endpoint: {reason}", "check with: serve status")


@contextlib.contextmanager
def run_endpoint(settings: Settings) -> Iterator[str]:
    """Run the endpoint during the context, which is its address. Raises as `start` and `stop`."""
    address = start(settings)
    try:
        yield address
    except BaseException:
        with contextlib.suppress(ClusterError):  # the first error is reported
            stop()
        raise
    stop()


def is_running() -> bool:
    """Whether a replica of the endpoint runs, or is being deployed. Slow where Serve's controller is
    unavailable.
    """
    try:
        application = serve.status().applications.get(NAME)
    except (RuntimeError, TimeoutError, RayError):
        return False
    if application is None:
        return False
    has_replica = any(
        state == "RUNNING" and count
        for deployment in application.deployments.values()
        for state, count in deployment.replica_states.items()
    )
    return has_replica or application.status == ApplicationStatus.DEPLOYING
