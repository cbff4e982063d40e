"""Canaries: secrets put where they may come from, looked for where they must never arrive."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli import main
from pipeline.config.load import load_config
from pipeline.engine.check import check_run
from pipeline.errors import ConfigError, ExitCode, UsageError
from pipeline.redact import has_credentials, redacted, without_secrets
from pipeline.run import RunConfig
from pipeline.track.folder import RUN_FILE, update_run_info
from pipeline.track.jsonl import JsonLinesWriter
from tests.run_folder import TINY

CANARY = "cAnaRy-7f3a9b1c"
SECRET_NAMES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "DB_PASSWD",
)


@pytest.mark.parametrize(
    "text",
    [
        f"cannot reach postgresql://user:{CANARY}@db.example/mlflow: refused",
        f"GET https://bucket.example/a.tar?X-Amz-Signature={CANARY}&x=1 failed",
        f"https://storage.example/blob?sv=2024&sig={CANARY}",
        f"header Authorization: Bearer {CANARY}",
        f"password={CANARY}",
        f'{{"secret_access_key": "{CANARY}"}}',
        f"DB_PASSWORD: '{CANARY}'",
        f"client(api_key='{CANARY}', retries=3)",
    ],
)
def test_a_secret_is_recognised_by_its_form(text):
    assert CANARY not in redacted(text)
    assert "***" in redacted(text)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_what_a_secret_variable_holds_is_blanked_wherever_it_stands(name, monkeypatch):
    monkeypatch.setenv(name, CANARY)
    assert redacted(f"so {CANARY}, without any form") == "so ***, without any form"


@given(
    user=st.text(string.ascii_letters, min_size=1),
    password=st.text(string.ascii_letters + string.digits + "!$%&*()+,-.;=_~#?", min_size=1),
)
def test_no_password_in_an_address_survives(user, password):
    text = f"error at https://{user}:{password}@host.example:5000/path, again"
    assert redacted(text) == f"error at https://{user}:***@host.example:5000/path, again"


@pytest.mark.parametrize(
    "text",
    [
        "step 12: loss 0.4, 8192 tokens, keys 3",
        "shard-000001.tar: clip-00007 at byte 512",
        "http://127.0.0.1:5000 refused the connection",
        "s3://bucket/run?versionId=3",
        "https://example.com/a:b",
        "user@host:/path",
    ],
)
def test_ordinary_words_stay_as_they_are(text):
    assert redacted(text) == text
    assert not has_credentials(text)


def test_values_behind_a_secrets_name_are_blanked_and_numbers_of_tokens_are_not():
    data = {"password": "short", "tokens": 12, "stage": {"hf_token": "x", "key": "clip-1"}}
    expected = {"password": "***", "tokens": 12, "stage": {"hf_token": "***", "key": "clip-1"}}
    assert without_secrets(data) == expected


@pytest.mark.parametrize(
    "uri", [f"postgresql://me:{CANARY}@db/mlflow", f"http://me:{CANARY}@127.0.0.1:5000"]
)
def test_a_configuration_with_a_password_is_refused_without_repeating_it(uri, tmp_path, capsys):
    override = f"track.mlflow.tracking_uri={uri}"
    with pytest.raises(ConfigError, match="without password or signature"):
        load_config(TINY, RunConfig, [override])
    assert main(["config", "show", str(TINY), override]) == ExitCode.CONFIG
    assert CANARY not in "".join(capsys.readouterr())
    text = TINY.read_text() + f"init_from: s3://key:{CANARY}@bucket/run\n"
    (tmp_path / "run.yaml").write_text(text)
    assert main(["config", "show", str(tmp_path / "run.yaml")]) == ExitCode.CONFIG
    assert CANARY not in "".join(capsys.readouterr())


def test_no_canary_arrives_in_a_runs_records(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", CANARY)
    writer = JsonLinesWriter(tmp_path / "events.jsonl")
    reason = f"ConnectionError: https://me:{CANARY}@mlflow.example refused {CANARY}"
    writer.write({"event": "fault", "reason": reason, "nested": [{"token": CANARY}]})
    writer.close()
    update_run_info(tmp_path, {"command": f"train tracking={CANARY}", "api_key": CANARY})
    for name in ("events.jsonl", RUN_FILE):
        assert CANARY not in (tmp_path / name).read_text()
        assert json.loads((tmp_path / name).read_text())


def test_no_canary_arrives_in_the_log_of_a_crash(monkeypatch, capsys):
    def crash(*_):
        raise RuntimeError(f"connecting to amqp://me:{CANARY}@host failed")

    monkeypatch.setattr("pipeline.cli._run", crash)
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == ExitCode.BUG
    printed = capsys.readouterr().err
    assert "amqp://me:***@host" in printed
    assert CANARY not in printed


def test_a_password_is_never_sent_in_clear_to_another_machine(monkeypatch):
    uri = "track.mlflow.tracking_uri=http://mlflow.example:5000"
    words = [uri, "track.mlflow.allow_plain_http=true"]
    config = load_config(TINY, RunConfig, words).config
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", CANARY)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD would be sent in clear") as at:
        check_run(config, 1)
    assert CANARY not in str(at.value)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    with pytest.raises(UsageError, match="no prepared dataset"):
        check_run(config, 1)
