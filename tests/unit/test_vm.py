"""Virtual machines as far as they are text: the guest's script, QEMU's command line, apt's answers."""

from __future__ import annotations

import lzma
import subprocess
from pathlib import Path

import pytest

from testbed.errors import MachineError
from testbed.host import GUEST_VARIABLE, REAL_TIME, VIRTUAL_TIME
from testbed.vm.guest import render_init
from testbed.vm.kernels import (
    choose_packages,
    extract_vmlinux,
    parse_mirror,
    parse_release,
    render_apt_configuration,
    render_sources,
)
from testbed.vm.model import VmJob
from testbed.vm.qemu import Accelerator, MachineFiles, build_qemu_command, build_virtiofsd_options

KERNEL = Path("/cache/kernels/trixie")
FILES = MachineFiles(
    KERNEL / "vmlinux", None, Path("/tmp/x/init"), Path("/tmp/x/root.sock"), Path("/tmp/x/console"), 7, 8, 9
)

SOURCES_822 = """\
Types: deb
# http://snapshot.example/archive
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates

Types: deb
URIs: http://mirror.example/debian-security
"""
DEPENDS_7 = """\
linux-image-7.3.4+deb13-amd64
  Depends: dracut
  Depends: linux-base-7.3.4+deb13-amd64
  Depends: linux-binary-7.3.4+deb13-amd64
  Depends: linux-modules-7.3.4+deb13-amd64
"""
DEPENDS_6 = """\
linux-image-6.12.9+deb13-amd64
  PreDepends: linux-base
  Depends: kmod
"""


def command_of(**changes: object) -> list[str]:
    settings = {
        "accelerator": Accelerator.TCG,
        "virtual_time": False,
        "cpus": 1,
        "memory_bytes": 1 << 30,
        "outputs": (),
    }
    return build_qemu_command("qemu", FILES, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("virtual_time", [False, True])
def test_init_is_a_shell_script_that_names_the_clock(virtual_time: bool) -> None:
    job = VmJob(("echo", "it's", "$HOME"), Path("/a b"), (Path("/out dir"),), {"X": "a'b"}, virtual_time)
    script = render_init(job, KERNEL, "6.12.9", {"PATH": "/bin", "X": "host"})
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    inner = script.partition("<<'END_OF_GUEST_SCRIPT'\n")[2].partition("\nEND_OF_GUEST_SCRIPT")[0]
    subprocess.run(["sh", "-n"], input=inner, text=True, check=True)
    assert f"export {GUEST_VARIABLE}={VIRTUAL_TIME if virtual_time else REAL_TIME}\n" in inner
    assert "export X='a'\"'\"'b'" in inner
    assert "setsid -w echo 'it'\"'\"'s' '$HOME' </dev/null" in inner
    assert "cd '/a b'" in inner
    assert "output0 $root'/out dir'" in script


def test_a_job_without_outputs_shares_none() -> None:
    script = render_init(VmJob(("true",), Path("/")), KERNEL, "6.12.9", {})
    assert "-t 9p" not in script
    assert "virtio-9p-pci" not in " ".join(command_of())


def test_virtual_time_counts_instructions_on_one_emulated_cpu() -> None:
    assert "shift=0,sleep=on" in command_of(virtual_time=True)
    assert "shift=0,sleep=off" in command_of(virtual_time=True, skip_idle=True)
    assert "-icount" not in command_of()
    for wrong in ({"accelerator": Accelerator.KVM}, {"cpus": 2}):
        with pytest.raises(ValueError, match="virtual time"):
            command_of(virtual_time=True, **wrong)


def test_a_comma_in_a_folder_does_not_end_an_option() -> None:
    assert "local,id=output0,path=/a,,b,security_model=none,multidevs=remap" in command_of(outputs=[Path("/a,b")])


def test_mirror_is_the_one_of_the_hosts_sources() -> None:
    assert parse_mirror(SOURCES_822) == "http://mirror.example/debian"
    assert (
        parse_mirror("# deb http://a/debian x\ndeb [signed-by=/k] https://b/debian bookworm main\n")
        == "https://b/debian"
    )
    assert parse_mirror("deb http://security.example/debian-security bookworm main\n") is None


def test_private_apt_touches_nothing_of_the_host() -> None:
    settings = render_apt_configuration(Path("/c/apt"))
    assert 'Dir::Etc::sourceparts "/dev/null"' in settings
    for key in ("Dir::State::lists", "Dir::Cache", "Dir::Etc::sourcelist"):
        assert f'{key} "/c/apt/' in settings
    assert (
        render_sources("sid", "http://m/debian", Path("/k"))
        == "deb [arch=amd64 signed-by=/k] http://m/debian sid main\n"
    )


def test_packages_of_a_kernel_before_and_since_it_was_split() -> None:
    assert choose_packages("6.12.9+deb13-amd64", DEPENDS_6) == ["linux-image-6.12.9+deb13-amd64"]
    parts = ("base", "binary", "image", "modules")
    assert choose_packages("7.3.4+deb13-amd64", DEPENDS_7) == [f"linux-{part}-7.3.4+deb13-amd64" for part in parts]


def test_release_is_that_of_the_image_the_meta_package_needs() -> None:
    assert parse_release("linux-base-amd64 (= 7), linux-image-7.3.4+deb13-amd64 (= 7.3.4-1)") == "7.3.4+deb13-amd64"
    with pytest.raises(MachineError, match="names no image"):
        parse_release("linux-base-amd64 (= 7)")


def test_elf_image_is_found_behind_what_only_looks_like_one() -> None:
    elf = b"\x7fELF" + bytes(range(256)) * 8
    decoy = lzma.compress(b"not an image", format=lzma.FORMAT_XZ)
    assert extract_vmlinux(b"MZ boot code" + decoy + lzma.compress(elf, format=lzma.FORMAT_XZ) + b"trailer") == elf
    with pytest.raises(MachineError, match="packed"):
        extract_vmlinux(b"MZ boot code" + decoy)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            "-o cache=<mode>\n",
            ["-o", "source=/r", "-o", "cache=always", "-o", "sandbox=chroot", "--thread-pool-size=1"],
        ),
        ("--shared-dir <DIR>\n", ["--shared-dir=/r", "--cache=always", "--sandbox=chroot"]),
        (
            "--shared-dir <DIR>\n--no-announce-submounts\n-o <COMPAT_OPTIONS>\n",
            ["--shared-dir=/r", "--cache=always", "--sandbox=chroot", "--no-announce-submounts"],
        ),
    ],
)
def test_virtiofsd_gets_its_own_options_wherever_it_lies(told: str, expected: list[str]) -> None:
    options = build_virtiofsd_options(told, Path("/r"), Path("/s"))

    assert [option for option in options if option != "--socket-path=/s"] == expected
    assert "--socket-path=/s" in options
