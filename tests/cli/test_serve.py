"""`ray-dfml serve`: one line with the true address, an end without loss, and one line for what it cannot do."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ray_dfml import student
from ray_dfml.cli.serve import _chosen
from ray_dfml.core import seeds
from ray_dfml.core.images import normalise
from ray_dfml.core.net import net
from ray_dfml.data.pool import Pool
from ray_dfml.learner import Learner
from ray_dfml.services.hosting import Gives
from ray_dfml.types import LearnerWeights
from tests.runtime import toy
from tests.services.serving import Reply, counts, get, post, request_of, send
from tests.support import card, random_teacher

Command = Callable[..., toy.Done]


@contextlib.contextmanager
def serving(*words: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of `ray-dfml serve`, and the first line that it prints."""
    command = [sys.executable, "-m", "ray_dfml", "serve", *map(str, words), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        yield process, line
    finally:
        process.kill()
        process.communicate()


def noise(pool: Path, count: int) -> np.ndarray:
    """Random images of the size that a pool's teachers take."""
    return np.random.default_rng(0).random((count, *Pool.open(pool).cards[0].image.shape), np.float32)


def test_a_teacher_is_served_until_it_is_stopped(toy_pool: Path, tmp_path: Path) -> None:
    """Its answers are the teacher's bits, what is at work is finished, and the next server goes on counting."""
    pool, counter = Pool.open(toy_pool), tmp_path / "counts"
    card, x = pool.cards[1], noise(toy_pool, 9)
    words = (f"{toy_pool}:{card.id}", "--access", "logits", "--counter", counter)
    replies: list[Reply] = []
    with serving(*words) as (process, line):
        said, _, url = line.rstrip().partition(" at ")
        assert said == f"serving {card.id}"
        found = post(url, request_of(x), model=card.id).json["outputs"][0]["data"]
        large = request_of(noise(toy_pool, 4096), binary=True)
        asking = threading.Thread(target=lambda: replies.append(post(url, large, model=card.id)))
        asking.start()
        while counts(url) == (9, 9):
            pass
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        asking.join()
    assert process.returncode == 0
    assert err.splitlines() == [f"{card.id}: 4105 images received, 4105 answered"]
    assert replies[0].status == 200
    mean, std = torch.tensor(card.image.mean), torch.tensor(card.image.std)
    theta, stats = map(torch.tensor, pool.load(card.id))
    network = net(card.arch, card.image.shape, len(card.classes))
    with torch.no_grad():
        wanted = network(theta, normalise(torch.tensor(x), mean, std), stats)
    assert np.array(found, np.float32).reshape(9, -1).tobytes() == wanted.numpy().tobytes()

    with serving(*words[1:], toy_pool, "--json", "--token-env", "TOKEN", TOKEN="tok-3f9a") as (process, line):
        found = json.loads(line)
        assert found["models"] == [card.id for card in pool.cards]
        assert (found["access"], found["output"]) == ("logits", "logits")
        assert get(found["url"], "/stats").status == 401
        assert counts(found["url"], Authorization="Bearer tok-3f9a") == (4105, 4105)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "tok-3f9a" not in out + err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((":nobody",), 2, "no teacher 'nobody'"),
        (("-not-here",), 2, "no pool here"),
        (("", "--decimals", "2"), 2, "are of probabilities; access is 'label'"),
        (("", "--access", "probs", "--top-k", "3"), 2, "top_k is 3, and there are 2 classes"),
        (("", "--host", "0.0.0.0"), 2, "--host 0.0.0.0: others can reach this address; set a token"),
        (("", "--token-env", "NOT_SET_ANYWHERE"), 2, "--token-env NOT_SET_ANYWHERE: the variable must hold a token"),
        (("", "--token-env", "sk-3f9a"), 2, "and not the key itself"),
        (("", "--rate", "0"), 2, "--rate"),
        (("", "--access", "weights"), 2, "--access"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_served_is_one_line(
    words: tuple[str, ...], code: int, said: str, toy_pool: Path, command: Command
) -> None:
    done = command("serve", f"{toy_pool}{words[0]}", "--access", "label", *words[1:])
    assert (done.code, done.out, len(done.err.splitlines())) == (code, "", 1)
    assert said in done.err
    assert "sk-3f9a" not in done.err
    assert not (toy_pool / "served.sqlite").exists()


def test_a_port_that_is_taken_is_named(toy_pool: Path, tmp_path: Path, command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ("serve", toy_pool, "--access", "label", "--port", port, "--counter", tmp_path / "counts")
        done = command(*words)
        assert (done.code, done.out) == (5, "")
        assert done.err == f"ray-dfml: port {port} of 127.0.0.1: is taken; choose another, or 0 for a free one\n"
        (tmp_path / "counts").write_bytes(b"something else")
        done = command(*words)
        assert done.code == 5
        assert done.err.startswith(f"ray-dfml: {tmp_path}/counts: the count of images cannot be kept here: ")


def test_what_students_give_is_theirs(tmp_path: Path, command: Command) -> None:
    """A run folder serves its students by the ids of their teachers."""
    teachers = ("a", "b")
    weights = {id: student_weights(id) for id in teachers}
    for id in teachers:
        student.export(
            student.file_of(tmp_path, id, teachers), weights[id], method="ideal", teacher=id, classes=("x", "y"),
            queries=0, profile="fixed", seed=0,
        )  # fmt: skip
    _, served = _chosen(f"{tmp_path}:b", Gives(access="probs"))
    assert [one.id for one in served] == ["b"]
    x = np.random.default_rng(0).integers(0, 256, (20, 1, 16, 16), dtype=np.uint8)
    found, good = served[0].answers(x.astype(np.float32) / 255)
    np.testing.assert_allclose(found, student.Student.load(tmp_path, teacher="b").predict_proba(x), atol=1e-5)
    assert np.abs(found - student.Student.load(tmp_path, teacher="a").predict_proba(x)).max() > 1e-3
    assert good.all()
    assert [one.id for one in _chosen(str(tmp_path), Gives(access="probs", top_k=2))[1]] == ["a", "b"]
    folder, (only,) = _chosen(str(tmp_path / "students" / "a.safetensors"), Gives(access="label"))
    assert (folder, only.id) == (tmp_path / "students", "a")
    done = command("serve", tmp_path, "--access", "probs", "--top-k", "3")
    assert done.err == "ray-dfml: a: top_k is 3, and there are 2 classes\n"
    done = command("serve", f"{tmp_path}:c", "--access", "label")
    assert (done.code, "no such student" in done.err) == (2, True)


def test_a_student_of_several_pools_has_a_colon_in_its_id(tmp_path: Path) -> None:
    run, teachers = tmp_path / "run:1", ("0:a", "1:a")
    run.mkdir()
    for id in teachers:
        student.export(
            student.file_of(run, id, teachers), student_weights(id), method="ideal", teacher=id, classes=("x", "y"),
            queries=0, profile="fixed", seed=0,
        )  # fmt: skip
    for model, wanted in ((f"{run}", [*teachers]), (f"{run}:1:a", ["1:a"])):
        folder, served = _chosen(model, Gives(access="label"))
        assert (folder, [one.id for one in served]) == (run, wanted)


def student_weights(id: str) -> LearnerWeights:
    """Random weights of a student of grey images of 16x16 pixels and two classes."""
    teacher = random_teacher(card(0, channels=1, way=2))
    theta = teacher.net.init(seeds.rng("student", id))
    return LearnerWeights(
        arch="conv4",
        image=teacher.card.image,
        outputs=2,
        theta=theta,
        stats=teacher.stats,
        head="maml",
        steps=0,
        lr=1.0,
    )


def support(x: np.ndarray, labels: list[str]) -> bytes:
    """The body of a request to adapt."""
    images = {"name": "images", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    named = {"name": "labels", "shape": [len(labels)], "datatype": "BYTES", "data": labels}
    return json.dumps({"inputs": [images, named]}).encode()


def test_a_learner_is_served(free_run: Path, tmp_path: Path) -> None:
    """It adapts to a support, and the classifier gives the probabilities of `AdaptedLearner`, image by image."""
    learner = Learner.load(free_run)
    learner.bn = "support"
    x = np.random.default_rng(0).random((9, *learner.image.shape), np.float32)
    labels = ["ä", "b", "ä", "b"]
    with serving(free_run, "--access", "probs", "--counter", tmp_path / "counts") as (process, line):
        said, _, url = line.rstrip().partition(" at ")
        assert said == "serving a learner"
        made = send(url, "POST", "/v2/adapt", support(x[:4], labels))
        assert (made.status, made.json["classes"]) == (200, ["ä", "b"])
        model = made.json["model"]
        assert send(url, "POST", "/v2/adapt", support(x[:4], labels)).json == made.json
        other = send(url, "POST", "/v2/adapt", support(x[:4], labels[::-1])).json
        assert other["model"] != model
        found = post(url, request_of(x[4:]), model=model).json["outputs"][0]
        assert found["shape"] == [5, 2]
        for body, why in (
            (support(x[:4], ["a"] * 4), "1 distinct labels"),
            (support(x[:4], ["a", "b"]), "labels are BYTES of shape [4]"),
            (request_of(x).body, "two inputs"),
            (support(x[:4, :, 1:], labels), "takes images of shape"),
        ):
            reply = send(url, "POST", "/v2/adapt", body)
            assert reply.status == 400
            assert why in reply.json["error"]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert f"{model}: 5 images received, 5 answered" in err.splitlines()
    wanted = learner.adapt(x[:4], labels).predict_proba(x[4:])
    np.testing.assert_allclose(np.array(found["data"]).reshape(5, 2), wanted, atol=1e-5)


def test_images_of_supports_count_for_the_rate(free_run: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((4, *Learner.load(free_run).image.shape), np.float32)
    with serving(free_run, "--access", "label", "--rate", "0.01", "--counter", tmp_path / "counts") as (_, line):
        url = line.rstrip().partition(" at ")[2]
        replies = [send(url, "POST", "/v2/adapt", support(x, ["a", "b", "a", "b"])).status for _ in range(2)]
    assert replies == [200, 429]


def test_no_more_is_given_away_than_the_pool_does(toy_pool: Path, tmp_path: Path, command: Command) -> None:
    """And a teacher that is a service already is left out."""
    pool = Path(shutil.copytree(toy_pool, tmp_path / "pool"))
    file = pool / "pool.yaml"
    file.write_text(file.read_text().replace("access: weights", "access: label"))
    first, *others = [card.id for card in Pool.open(pool).cards]
    done = command("serve", f"{pool}:{first}", "--access", "probs")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"ray-dfml: {first}: {pool} gives away 'label' only; serve it with --access label\n"
    _, served = _chosen(str(pool), Gives(access="label"))
    assert [one.id for one in served] == [first, *others]
    content = yaml.safe_load(file.read_text())
    api = {"url": "http://127.0.0.1:1", "adapter": "oip", "model": "m", "output": "label"}
    gone = dict.fromkeys(("weights", "sha256", "arch", "mean", "std"))
    content["teachers"][0] |= {"api": api, **gone}
    file.write_text(yaml.safe_dump(content))
    done = command("serve", f"{pool}:{first}", "--access", "label")
    assert (done.code, "is a service already" in done.err) == (2, True)
    _, served = _chosen(str(pool), Gives(access="label"))
    assert [one.id for one in served] == others


def test_probabilities_are_no_finer_than_the_pools(toy_pool: Path, tmp_path: Path, command: Command) -> None:
    """What the entry says is the default; more is refused, less and labels are given."""
    pool = Path(shutil.copytree(toy_pool, tmp_path / "pool"))
    file = pool / "pool.yaml"
    content = yaml.safe_load(file.read_text())
    content["teachers"][0] |= {"access": "probs", "decimals": 2, "top_k": 1}
    file.write_text(yaml.safe_dump(content))
    model = f"{pool}:{content['teachers'][0]['id']}"

    def gives(**wanted: int) -> Gives:
        (served,) = _chosen(model, Gives(access="probs", **wanted))[1]
        return served.gives

    assert gives() == Gives(access="probs", decimals=2, top_k=1)
    assert gives(decimals=0) == Gives(access="probs", decimals=0, top_k=1)
    assert _chosen(model, Gives(access="label"))[1][0].gives == Gives(access="label")
    for option, value in (("decimals", 3), ("top-k", 2)):
        done = command("serve", model, "--access", "probs", f"--{option}", value)
        said = f"its pool gives away {option.replace('-', '_')} {value - 1} and no more, got {value}\n"
        assert (done.code, done.out, done.err.endswith(said)) == (2, "", True), done.err


def test_damaged_weights_are_not_served(toy_pool: Path, tmp_path: Path, command: Command) -> None:
    id = toy.damage(toy_pool, tmp_path / "pool", 1, float("nan"))
    done = command("serve", tmp_path / "pool", "--access", "label")
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith(f"ray-dfml: {id}: ")
