"""The Ray Serve application: HTTP in front of `handler.Night`, and the watch for the next night."""

import logging
import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve

import recray
from recray.config import Settings
from recray.errors import ClusterError, RequestError
from recray.serving.api import Health, ModelsResponse, RecommendRequest, RecommendResponse
from recray.serving.handler import Night
from recray.storage import Storage

NAME = "recray"

api = FastAPI(title="recray", version=recray.__version__, description="Recommendations from the published night and the model behind it.")


@api.exception_handler(RequestError)
def _refuse(_: Request, error: RequestError) -> JSONResponse:
    return JSONResponse({"detail": error.what, "fix": error.fix}, status_code=422)


@serve.ingress(api)
class Endpoint:
    """One replica. Loads the published night, and swaps to the next one when `LATEST.json` names it."""

    def __init__(self, root: str, poll_s: float) -> None:
        import torch

        torch.set_num_threads(1)
        self.storage = Storage(Path(root))
        self._published = self.storage.latest.read_bytes()
        self.night = Night.load(self.storage)
        threading.Thread(target=self._watch, args=(poll_s,), daemon=True).start()

    def _watch(self, poll_s: float) -> None:
        """Load a new night aside and swap the reference; a night that cannot be loaded leaves the old one in place."""
        wait = threading.Event()
        while not wait.wait(poll_s):
            try:
                found = self.storage.latest.read_bytes()
                if found == self._published:
                    continue
                self._published = found  # tried once: what is broken stays broken until something else is published
                self.night = Night.load(self.storage)
            except Exception as error:  # whatever it is, this thread must live on
                logging.getLogger("ray.serve").error("the published night cannot be loaded, the old one stays: %s", error)

    @api.post("/v1/recommend", summary="Recommend items", response_model=RecommendResponse)
    def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """For a user of the event log, for a history sent along, or for somebody unknown."""
        return self.night.recommend(request)

    @api.get("/v1/models", summary="What is served", response_model=ModelsResponse)
    def models(self) -> ModelsResponse:
        return self.night.describe()

    @api.get("/healthz", summary="Is the replica answering", response_model=Health)
    def health(self) -> Health:
        return Health(status="ok", night=self.night.date)


def build(settings: Settings) -> Any:
    """The application of these settings, to run or to deploy."""
    options = settings.serve
    deployment: Any = serve.deployment(
        Endpoint,
        num_replicas=options.replicas,
        max_ongoing_requests=options.max_ongoing_requests,
        max_queued_requests=options.max_queued_requests,
        ray_actor_options={"num_cpus": 0.1},
    )
    return deployment.bind(str(settings.root()), options.poll_s)


def start(settings: Settings) -> str:
    """Serve the published night and return the address. Needs a Ray session.

    Raises MissingArtifactError when no night is published, DamagedArtifactError, ClusterError.
    """
    Night.load(Storage(settings.root()))  # a clear error here beats a deployment that never becomes healthy
    options = settings.serve
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options={"host": options.host, "port": options.port, "access_log": False})
        serve.run(build(settings), name=NAME, route_prefix="/")
    except (RuntimeError, ValueError) as error:
        raise ClusterError(f"the endpoint did not start: {error}", f"is port {options.port} free? else set serve.port") from error
    return f"http://{options.host}:{options.port}"


def stop() -> None:
    """Take the endpoint down; other applications of the cluster stay."""
    serve.delete(NAME)
