"""Passwords and tokens never come into settings, hence never into what is recorded of them."""

import pytest

from eclipse_ray import verbs
from eclipse_ray.config import Config, holds_secret, load_config
from eclipse_ray.datasets.synthetic import write_synthetic
from eclipse_ray.errors import ConfigError
from eclipse_ray.parameters import resolve


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket/data",
        "https://host/data?token=hunter2",
        "https://host/data?X-Amz-Credential=a&X-Amz-Signature=hunter2",
        "https://account.blob.core.windows.net/c?sv=2024&sig=hunter2",
        "zip://a.zip::https://user:hunter2@host/a.zip",
        "https://host/data#access_token=hunter2",
        "https://[broken/hunter2",
    ],
)
def test_a_url_with_a_secret_is_refused_without_showing_it(url):
    assert holds_secret(url)
    for use in (
        lambda: load_config(None, {"data.source": url}),
        lambda: resolve(Config(), {"data.output": url}, {}),
        lambda: load_config(None, {"matrix.poisons": [{"name": "ar", "data.source": url}]}),
    ):
        with pytest.raises(ConfigError, match="holds a password, token or signature") as caught:
            use()
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket/a@b:c/data", "/local/a:b@c?token=1", "gs://me@bucket/x", "https://host/x?revision=main"]
)
def test_other_locations_are_taken(url):
    assert load_config(None, {"data.source": url}).data.source == url


def test_a_refused_call_writes_nothing(tmp_path):
    write_synthetic(str(tmp_path / "src"), 4, 16, 0)
    with pytest.raises(ConfigError):
        verbs.convert(
            str(tmp_path / "src"), str(tmp_path / "dst"), settings={"data.test": "https://x/y?token=hunter2"}
        )
    assert not (tmp_path / "dst").exists()


def test_a_config_file_may_lie_at_any_url(tmp_path):
    (tmp_path / "run.yaml").write_text("purify: {t_star: 7}\nrun: {seed: 3}\n")
    config = resolve(f"file://{tmp_path}/run.yaml", {"run.seed": 4}, {})
    assert (config.purify.t_star, config.run.seed) == (7, 4)
    with pytest.raises(ConfigError, match="there is no such file"):
        resolve(f"file://{tmp_path}/none.yaml", None, {})
    with pytest.raises(ConfigError) as caught:
        resolve("https://me:hunter2@host/run.yaml", None, {})
    assert "hunter2" not in str(caught.value)
