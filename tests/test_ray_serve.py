"""The server's application as a deployment of Ray Serve with two replicas, as docs/server.md has it."""

import socket

import pytest

import qvl_runtime as qvl


def test_replicas_answer_as_the_model_does(demo_model):
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve", exc_type=ImportError)
    httpx = pytest.importorskip("httpx")
    path = str(demo_model.blob.path)

    def application():
        from qvl_runtime.server import create_app

        return create_app(qvl.load(path, device="cpu"))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        replicas = serve.deployment(serve.ingress(application)(), num_replicas=2, ray_actor_options={"num_cpus": 0.5})
        serve.run(replicas.bind())
        asked = {"prompt": "Describe", "max_tokens": 8, "temperature": 0}
        expected = demo_model.generate("Describe", max_new_tokens=8).text
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            for _ in range(4):
                reply = client.post("/v1/completions", json=asked)
                assert reply.status_code == 200 and reply.json()["choices"][0]["text"] == expected
    finally:
        serve.shutdown()
        ray.shutdown()
