"""`puna doctor` tells what is there, and what is missing with the command that mends it."""

import json
import os
import shutil
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

import puna.evaluate.sandbox
import puna.model.layer_kernel
import puna.quantized.kernel
from puna import devices
from puna.cli import doctor, run
from puna.errors import PunaError


@pytest.fixture
def versions(monkeypatch):
    """Lets a test say which versions are installed: name -> version, or None for a package that is not there."""
    changed: dict[str, str | None] = {}
    real = metadata.version

    def version(name: str) -> str:
        if name in changed:
            if changed[name] is None:
                raise metadata.PackageNotFoundError(name)
            return changed[name]
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    return changed


@pytest.fixture
def programs(monkeypatch):
    """Lets a test say which programs are there, and be root."""
    there: set[str] = set()
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("CXX", raising=False)
    return there


def only(check, monkeypatch):
    monkeypatch.setattr(doctor, "_CHECKS", (check,))


def found(check) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in check()}


def test_this_machine_has_what_its_tests_need(capsys):
    assert run(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert err == ""
    assert shown["ok"] is True
    findings = {finding["name"]: finding for finding in shown["findings"]}
    assert findings["torch"]["found"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert findings["Python"]["found"] == f"{sys.version.split()[0]} at {sys.executable}"
    assert {
        "puna",
        "numpy",
        "pyarrow",
        "datasketch",
        "processor",
        "C++ compiler",
        "C compiler",
        "sandbox",
        "disk",
    } < findings.keys()
    assert not {"pytest", "ruff"} & findings.keys()
    assert {finding["state"] for finding in findings.values()} <= {"ok", "note"}
    assert all(finding["remedy"] is None for finding in findings.values() if finding["state"] == "ok")


@pytest.mark.parametrize(
    ("version", "message"), [(None, "not installed"), ("2.9.1", "2.9.1 is too old; 2.11 or newer is needed")]
)
def test_a_required_package_that_is_missing_or_old_fails_with_the_command_that_mends_it(
    versions, monkeypatch, capsys, version, message
):
    versions["torch"] = version
    only(doctor._packages, monkeypatch)
    assert run(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(f"missing  torch: {message}")
    assert lines[at + 1].strip() == "pip install 'torch>=2.11'"
    assert lines[-1] == "1 required things are missing"
    assert run(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_versions_are_compared_as_numbers(versions):
    for version, state in [("2.11.0", "ok"), ("2.100", "ok"), ("3.0.0a1+cpu", "ok"), ("2.2", "missing")]:
        versions["torch"] = version
        assert found(doctor._packages)["torch"].state == state


def test_an_optional_package_that_is_missing_is_noted_with_what_it_is_for(versions, monkeypatch, capsys):
    versions["datasketch"] = None
    only(doctor._packages, monkeypatch)
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "note     datasketch: not installed; only for puna prepare --near-duplicates" in out
    assert "pip install 'datasketch>=1.6'" in out
    assert out.endswith("nothing that is required is missing\n")


def test_a_package_that_only_its_folder_holds_is_to_be_installed(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    (finding,) = doctor._packages()
    assert (finding.state, finding.remedy) == ("missing", "pip install -e .")


def test_every_extra_of_the_package_is_explained():
    extras = set(metadata.metadata("puna").get_all("Provides-Extra")) - {"dev"}
    assert extras == set(doctor.EXTRAS)


def test_an_old_python_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    (finding,) = doctor._python()
    assert (finding.state, finding.remedy) == ("missing", "install Python 3.11 or newer")


def test_a_processor_without_bf16_units_is_told_to_use_fp32(monkeypatch):
    monkeypatch.setattr(devices, "cpu_bf16_units", lambda: [])
    finding = found(doctor._processor)["bf16 on the processor"]
    assert finding.state == "note"
    assert "fp32" in finding.remedy
    monkeypatch.setattr(devices, "cpu_bf16_units", lambda: ["amx_bf16"])
    finding = found(doctor._processor)["bf16 on the processor"]
    assert (finding.state, finding.found, finding.remedy) == ("ok", "amx_bf16", None)


def test_accelerators_are_listed_with_memory_and_peak(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (2**30, 139 * 2**30))
    names = {0: "NVIDIA H200", 1: "Ascend910B2"}
    module = SimpleNamespace(get_device_name=lambda device: names[device.index])
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    shown = found(doctor._devices)
    assert shown["cuda:0"].found == "NVIDIA H200, 139 GiB, 989 TFLOP/s of bf16 published"
    assert shown["cuda:1"].found == "Ascend910B2, 139 GiB, its peak is unknown to puna"
    assert "accelerator" not in shown


@pytest.mark.parametrize("has_them", [True, False])
def test_a_container_that_cannot_build_kernels_is_told_of(monkeypatch, programs, has_them):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (2**30, 139 * 2**30))
    monkeypatch.setattr(devices, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(devices, "has_triton", lambda: has_them)
    programs.add("apt-get")
    finding = found(doctor._devices).get("kernels of accelerators")
    assert (finding and finding.remedy) == (None if has_them else "apt-get install -y gcc python3-dev")


def test_without_accelerators_the_processor_computes(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (finding,) = doctor._devices()
    assert finding.found.startswith("none: the processor computes, ")


@pytest.mark.parametrize(
    ("manager", "command"),
    [("apt-get", "apt-get install -y g++"), ("dnf", "dnf install -y gcc-c++"), ("apk", "apk add g++")],
)
def test_a_missing_compiler_is_noted_with_the_systems_own_command(programs, monkeypatch, manager, command):
    programs.add(manager)
    (finding,) = doctor._compiler()
    assert (finding.state, finding.remedy) == ("note", command)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (finding,) = doctor._compiler()
    assert finding.remedy == f"sudo {command}"
    programs.add("clang++")  # which torch takes where it is named alone
    monkeypatch.setenv("CXX", "clang++")
    (finding,) = doctor._compiler()
    assert (finding.state, finding.found) == ("ok", "/bin/clang++")


def test_a_missing_c_compiler_is_noted_with_what_it_is_for(programs):
    programs.add("apt-get")
    (finding,) = doctor._kernels()
    assert (finding.state, finding.remedy) == ("note", "apt-get install -y g++")
    assert "models generate faster" in finding.found


@pytest.mark.parametrize(
    ("of_bf16", "of_codes", "found"),
    [
        (object(), object(), "/bin/gcc makes kernels for models in bf16, int8, int4"),
        (None, object(), "/bin/gcc makes kernels for models in int8, int4"),
        (None, None, "/bin/gcc makes no kernel for this processor, so torch multiplies"),
    ],
)
def test_a_c_compiler_is_shown_with_the_kernels_that_it_makes_here(programs, monkeypatch, of_bf16, of_codes, found):
    programs.add("gcc")
    monkeypatch.setattr(puna.model.layer_kernel, "kernel", lambda: of_bf16)
    monkeypatch.setattr(puna.quantized.kernel, "kernel", lambda: of_codes)
    assert list(doctor._kernels()) == [doctor.Finding("C compiler", "ok", found)]


def test_missing_bubblewrap_is_noted_with_the_systems_own_command(programs, monkeypatch):
    programs.add("apt-get")
    (finding,) = doctor._sandbox()
    assert (finding.state, finding.remedy) == ("note", "apt-get install -y bubblewrap")
    assert "no bubblewrap" in finding.found


def test_bubblewrap_that_cannot_make_namespaces_is_noted_with_its_own_remedy(programs, monkeypatch):
    def refuse(self):
        raise PunaError("the sandbox does not work on this machine\nuser namespaces must be allowed")

    programs.add("bwrap")
    monkeypatch.setattr(puna.evaluate.sandbox.Sandbox, "__enter__", refuse)
    (finding,) = doctor._sandbox()
    assert finding.state == "note"
    assert finding.found.startswith("the sandbox does not work on this machine; only puna evaluate")
    assert finding.remedy == "user namespaces must be allowed"


def test_a_full_disk_is_noted(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**30))
    (finding,) = doctor._disk()
    assert finding.state == "note"
    assert finding.found.startswith("3 GiB free at ")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300 * 2**30))
    (finding,) = doctor._disk()
    assert (finding.state, finding.remedy) == ("ok", None)
