"""The clients of others use our server unchanged, and our client uses a server of others: `pytest -m compat`.

MLServer is installed into an environment of its own, below the temporary folder, or found in MLSERVER_PYTHON.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ray_dfml.data.services import Api, Asked
from ray_dfml.errors import RejectedError
from ray_dfml.services.gateway import Gateway
from ray_dfml.services.hosting import OUTPUTS
from ray_dfml.services.probe import probe
from ray_dfml.types import Access, TeacherCard
from tests.services.serving import SHAPE, counts, images, running, served
from tests.support import image_spec

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("default")]
LEVELS: tuple[Access, ...] = ("logits", "probs", "label")


@pytest.mark.parametrize("access", LEVELS)
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient(access: Access, binary: bool, tmp_path: Path) -> None:
    """As its own examples do: health, metadata, and `infer` with and without outputs, ids and compression."""
    http = pytest.importorskip("tritonclient.http")
    utils = pytest.importorskip("tritonclient.utils")
    x = images(5)
    with running([served(access)], tmp_path) as (url, _):
        client = http.InferenceServerClient(url.removeprefix("http://"))
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("t")
        assert client.is_model_ready("t", "1")
        assert client.get_server_metadata()["name"] == "ray-dfml"
        said = client.get_model_metadata("t")
        (given,), (gives,) = said["inputs"], said["outputs"]
        assert given["shape"] == [-1, *SHAPE]
        tensor = http.InferInput(given["name"], list(x.shape), given["datatype"])
        tensor.set_data_from_numpy(x, binary_data=binary)
        wanted, _ = served(access).answers(x)
        asked = [http.InferRequestedOutput(gives["name"], binary_data=binary)]
        for options in ({}, {"outputs": asked}, {"outputs": asked, "request_id": "7"}, {"request_id": "7"},
                        {"request_compression_algorithm": "gzip"}, {"model_version": "1"}):  # fmt: skip
            result = client.infer("t", [tensor], **options)
            np.testing.assert_array_equal(result.as_numpy(OUTPUTS[access]), wanted)
            assert result.get_response().get("id") == options.get("request_id")
        assert counts(url) == (30, 25)
        with pytest.raises(utils.InferenceServerException, match="not 'nothing'"):
            client.infer("t", [tensor], outputs=[http.InferRequestedOutput("nothing")])
        with pytest.raises(utils.InferenceServerException, match="no parameter 'classification'"):
            client.infer("t", [tensor], outputs=[http.InferRequestedOutput(gives["name"], class_count=2)])
        bytes_of = http.InferInput("images", list(x.shape), "UINT8")
        bytes_of.set_data_from_numpy((x * 255).astype(np.uint8), binary_data=binary)
        with pytest.raises(utils.InferenceServerException, match="send uint8 pixels as FP32, over 255"):
            client.infer("t", [bytes_of])
        client.close()


@pytest.mark.parametrize("access", LEVELS)
def test_open_inference_openapi(access: Access, tmp_path: Path) -> None:
    client_of = pytest.importorskip("open_inference.openapi.client")
    errors = pytest.importorskip("open_inference.openapi.errors.bad_request_error")
    types = "open_inference.openapi.types"
    request = pytest.importorskip(f"{types}.inference_request").InferenceRequest
    tensor = pytest.importorskip(f"{types}.request_input").RequestInput
    x = images(5)
    with running([served(access)], tmp_path) as (url, _):
        client = client_of.OpenInferenceClient(base_url=url)
        client.check_server_liveness()
        client.check_server_readiness()
        client.check_model_readiness("t")
        client.check_model_version_readiness("t", "1")
        assert client.read_server_metadata().name == "ray-dfml"
        said = client.read_model_metadata("t")
        assert said == client.read_model_version_metadata("t", "1")
        given = tensor(name=said.inputs[0].name, shape=list(x.shape), datatype="FP32", data=x.ravel().tolist())
        wanted, _ = served(access).answers(x)
        for answer in (
            client.model_infer("t", request=request(inputs=[given])),
            client.model_version_infer("t", "1", request=request(id="a", inputs=[given])),
        ):
            (output,) = answer.outputs
            assert (output.name, output.datatype) == (OUTPUTS[access], said.outputs[0].datatype)
            data = output.data.__root__ if hasattr(output.data, "__root__") else output.data
            np.testing.assert_array_equal(np.array(data, wanted.dtype).reshape(wanted.shape), wanted)
        with pytest.raises(errors.BadRequestError):
            client.model_infer("t", request=request(inputs=[]))


MODEL = '''
import numpy as np
from mlserver import MLModel
from mlserver.types import InferenceResponse
from mlserver.codecs import NumpyCodec


class Mean(MLModel):
    """Probabilities of three classes from the mean of an image, and the label."""

    async def load(self):
        return True

    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float64)
        logits = x.reshape(len(x), -1).mean(1)[:, None] * np.array([[-40.0, 0.0, 40.0]]) + [[20.0, 0.0, -20.0]]
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return InferenceResponse(model_name=self.name, outputs=[
            NumpyCodec.encode_output("probabilities", probs.astype(np.float32)),
            NumpyCodec.encode_output("label", probs.argmax(1).astype(np.int64)),
        ])
'''


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of MLServer 1.7.1 with a model `mean` of 1x16x16 images."""
    folder = tmp_path_factory.mktemp("mlserver")
    python = os.environ.get("MLSERVER_PYTHON", "")
    if not python:
        python = str(folder / "env" / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "mlserver==1.7.1"], check=True)
    ports = []
    for _ in range(3):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    (folder / "models" / "mean").mkdir(parents=True)
    (folder / "models" / "mean" / "mean_model.py").write_text(MODEL)
    shape = {"datatype": "FP32", "shape": [-1, 1, 16, 16]}
    settings = {
        "name": "mean", "implementation": "mean_model.Mean", "inputs": [{"name": "pixels", **shape}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
                    {"name": "label", "datatype": "INT64", "shape": [-1, 1]}],
    }  # fmt: skip
    (folder / "models" / "mean" / "model-settings.json").write_text(json.dumps(settings))
    server = {"host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2],
              "parallel_workers": 0}  # fmt: skip
    (folder / "models" / "settings.json").write_text(json.dumps(server))
    program = Path(python).with_name("mlserver")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [program, "start", "."], cwd=folder / "models", stdout=log, stderr=log, env=environment
        )
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/v2/models/mean/ready", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def of_mlserver(url: str, access: Access, **api: object) -> Asked:
    """The entry of the model that MLServer serves."""
    options = {"adapter": "oip", "model": "mean", "output": OUTPUTS[access], "batch": 50} | api
    card = TeacherCard(id="mean", arch="", image=image_spec(1, 16), classes=("a/0", "a/1", "a/2"), access=access)
    return Asked(card=card, api=Api(url=url, **options))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("access", ["probs", "label"])
@pytest.mark.parametrize("binary", ["auto", "off"])
def test_mlserver(access: Access, binary: str, mlserver: str, tmp_path: Path) -> None:
    """Our client finds out what MLServer takes, and asks it about 200 images."""
    asked = of_mlserver(mlserver, access, binary=binary)
    found = probe(asked, tmp_path / "probe.sqlite")
    assert (found.api.input, found.api.datatype, found.api.binary) == ("pixels", "FP32", "off")
    assert found.spent.sent == (2 if binary == "auto" else 1), "MLServer answers 500 to binary tensors"
    x = np.random.default_rng(0).integers(0, 256, (200, *SHAPE), dtype=np.uint8)
    x[:100] //= 2
    logits = (x / 255).reshape(200, -1).mean(1)[:, None] * np.array([[-40.0, 0.0, 40.0]]) + [[20.0, 0.0, -20.0]]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    with Gateway(tmp_path / "ledger.sqlite", [Asked(card=asked.card, api=found.api)]) as gateway:
        answers = gateway.ask("mean", x)
        spent = gateway.totals()["mean"]
    if access == "label":
        np.testing.assert_array_equal(answers, probs.argmax(1))
    else:
        np.testing.assert_allclose(answers, probs, atol=1e-5)
    assert (spent.sent, spent.answered) == (200, 200)


def test_what_mlserver_lacks_is_said_before_an_image_is_sent(mlserver: str, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="the server has no output 'logits'; it has probabilities, label"):
        probe(of_mlserver(mlserver, "logits"), tmp_path / "a.sqlite")
    with pytest.raises(RejectedError, match="has no model men"):
        probe(of_mlserver(mlserver, "label", model="men"), tmp_path / "b.sqlite")
