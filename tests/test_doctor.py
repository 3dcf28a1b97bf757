"""`flexft doctor` sees what is registered, and says what is not."""

import pytest

from vllm_flexft import doctor
from vllm_flexft.cli.main import main


def test_every_finding_of_a_healthy_installation_is_good():
    assert [finding for finding in doctor.check() if not finding.ok] == []


def test_missing_registration_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert {finding.name for finding in doctor.check() if not finding.ok} == {
        "vllm.general_plugins",
        "vllm.endpoint_plugins",
    }


def test_probe_that_raises_is_a_finding(monkeypatch):
    def explode(group):
        raise RuntimeError("broken metadata")

    monkeypatch.setattr(doctor, "entry_points", explode)
    assert any("broken metadata" in finding.detail for finding in doctor.check())


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_exit_status_says_whether_all_is_well(monkeypatch, capsys, ok, status):
    monkeypatch.setattr(doctor, "check", lambda: [doctor.Finding("vllm", ok, "0.32.0")])
    assert main(["doctor"]) == status
    assert "vllm: 0.32.0" in capsys.readouterr().out
