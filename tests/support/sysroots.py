"""Trees of procfs, sysfs, /etc and /dev of the machines that edge-agent is for, and of others.

Device nodes are plain files: their mode and owner are what is looked at.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

RELEASE = "# R{major} (release), REVISION: {rest}, GCID: 43688277, BOARD: generic, EABI: aarch64\n"
NVPMODEL = """\
< PARAM TYPE=FILE NAME=CPU_ONLINE >
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=1 >
"""
PRESSURE = """\
some avg10=0.00 avg60=0.10 avg300=0.00 total=1173
full avg10=0.00 avg60=0.05 avg300=0.00 total=750
"""
SWAPS = "Filename\tType\tSize\tUsed\tPriority\n"
ORIN_NODES = ("nvmap", "nvgpu/igpu0/ctrl", "dri/card0", "dri/renderD128")
OPENRM_NODES = ("nvidia0", "nvidiactl", "nvidia-uvm")


def put(root: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files below `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def meminfo(total_kb: int, available_kb: int, *more: str) -> str:
    """/proc/meminfo with these two and what else is given."""
    lines = [f"MemTotal: {total_kb:>15} kB", "MemFree:           65536 kB"]
    lines += [f"MemAvailable: {available_kb:>11} kB", *more]
    return "\n".join(lines) + "\n"


def orin_nano(root: Path) -> None:
    """Orin Nano 8GB developer kit, JetPack 7.2."""
    _jetson(
        root, "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "p3767-0005", 234
    )
    zram = "SwapTotal:       3894784 kB", "SwapFree:        3894784 kB"
    cma = "CmaTotal:         262144 kB", "CmaFree:          200000 kB"
    nvmap = ("NvMapMemUsed:    1048576 kB",)
    put(
        root,
        {
            "etc/nv_tegra_release": RELEASE.format(major=39, rest="2.0"),
            "proc/meminfo": meminfo(7_789_568, 5_242_880, *zram, *cma, *nvmap),
            "proc/swaps": SWAPS + "/dev/zram0 partition 3894784 0 5\n",
            "var/lib/dpkg/status": (
                "Package: nvidia-l4t-core\nVersion: 39.2.0-20260601\n\n"
                "Package: nvidia-jetpack\nStatus: install ok installed\nVersion: 7.2+b96\n\n"
            ),
        },
    )
    _nvgpu(root, load_permille=345)
    _zones(root, ("cpu-thermal", 48_906), ("gpu-thermal", 49_593), ("tj-thermal", 49_593))
    _ina3221(root, 1, ("VDD_IN", 19_000, 314), ("VDD_CPU_GPU_CV", 4_900, 340), ("NC", 0, 0))


def agx_orin(root: Path) -> None:
    """AGX Orin 64GB, JetPack 7.2.1, where nvpmodel has kept no mode yet."""
    _jetson(root, "NVIDIA Jetson AGX Orin Developer Kit", "p3701-0005", 234)
    (root / "var/lib/nvpmodel/status").unlink()
    put(
        root,
        {
            "etc/nv_tegra_release": RELEASE.format(major=39, rest="2.1"),
            "proc/meminfo": meminfo(64_349_184, 58_720_256),
            "proc/swaps": SWAPS + "/dev/nvme0n1p2 partition 16777212 0 -2\n",
        },
    )
    _nvgpu(root, load_permille=0)
    _zones(root, ("cpu-thermal", 91_000), ("gpu-thermal", -256_000), ("PMIC-Die", 100_000))
    _ina3221(
        root,
        1,
        ("VDD_GPU_SOC", 19_800, 201),
        ("VDD_CPU_CV", 19_800, 40),
        ("VIN_SYS_5V0", 5_000, 900),
    )


def thor(root: Path) -> None:
    """Thor T5000, JetPack 7.2: the driver of discrete cards, clocks without a load."""
    _jetson(root, "NVIDIA Jetson AGX Thor Developer Kit", "p3834-0008", 264)
    put(
        root,
        {
            "etc/nv_tegra_release": RELEASE.format(major=39, rest="2.0"),
            "proc/meminfo": meminfo(128_790_528, 94_371_840),
            "sys/class/devfreq/bwmgr/cur_freq": "2750000000\n",
            "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000\n",
            "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000\n",
            "sys/class/hwmon/hwmon4/name": "ina238\n",
            "sys/class/hwmon/hwmon4/power1_input": "19780000\n",
        },
    )
    _zones(root, ("gpu-thermal", 38_875), ("tj-thermal", 41_000))
    nodes(root, *OPENRM_NODES, "dri/renderD128")


def old_orin(root: Path) -> None:
    """An Orin Nano that still runs JetPack 6.2.2."""
    orin_nano(root)
    (root / "var/lib/dpkg/status").unlink()
    put(root, {"etc/nv_tegra_release": RELEASE.format(major=36, rest="5.0")})


def gb10(root: Path) -> None:
    """DGX Spark: Arm and unified memory, but no Jetson and no device tree."""
    _pc(root, "NVIDIA", "NVIDIA_DGX_Spark", 127_600_748)
    nodes(root, *OPENRM_NODES)


def discrete(root: Path) -> None:
    """A PC with an NVIDIA card."""
    _pc(root, "ASUSTeK COMPUTER INC.", "ROG STRIX", 65_536_000)
    nodes(root, *OPENRM_NODES)


def plain_pc(root: Path) -> None:
    """A PC without one."""
    _pc(root, "Dell Inc.", "OptiPlex 7070", 16_000_000)


PROFILES: dict[str, Callable[[Path], None]] = {
    "orin_nano": orin_nano,
    "agx_orin": agx_orin,
    "thor": thor,
    "old_orin": old_orin,
    "gb10": gb10,
    "discrete": discrete,
    "plain_pc": plain_pc,
}


def nodes(root: Path, *names: str, mode: int = 0o660) -> None:
    """Device nodes, owned by the user and group of the tests."""
    for name in names:
        put(root, {f"dev/{name}": ""})
        (root / "dev" / name).chmod(mode)


def unit(root: Path, *lines: str) -> None:
    """The daemon's unit, installed; the group of the tests is called video and render."""
    put(root, {"etc/systemd/system/edge-agent.service": "\n".join(["[Service]", *lines]) + "\n"})


def _jetson(root: Path, model: str, part: str, soc: int) -> None:
    carrier = "p3768-0000"
    compatible = f"nvidia,{carrier}+{part}-super\0nvidia,{part}\0nvidia,tegra{soc}\0"
    base = {"proc/device-tree/model": model + "\0", "proc/device-tree/compatible": compatible}
    put(root, base | _common())
    put(
        root, {"etc/nvpmodel.conf": NVPMODEL, "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n"}
    )


def _pc(root: Path, vendor: str, product: str, total_kb: int) -> None:
    dmi = {"sys_vendor": vendor, "product_name": product}
    put(root, {f"sys/class/dmi/id/{name}": f"{text}\n" for name, text in dmi.items()})
    put(root, {**_common(), "proc/meminfo": meminfo(total_kb, total_kb // 2)})


def _common() -> dict[str, str]:
    group = os.getgid()
    return {
        "etc/group": f"root:x:0:\nvideo:x:{group}:\nrender:x:{group}:\nrobots:x:4000:robot\n",
        "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nrobot:x:4242:4242::/home/robot:/bin/sh\n",
        "proc/swaps": SWAPS,
        "proc/pressure/memory": PRESSURE,
        "proc/buddyinfo": "Node 0, zone   Normal    120     30     10      0      2      0 \n",
        "run/systemd/timesync/synchronized": "",
    }


def _nvgpu(root: Path, load_permille: int) -> None:
    """The GPU of Orin: devfreq points into the device, which has the load."""
    device = "sys/devices/platform/bus@0/17000000.gpu"
    entry = f"{device}/devfreq/17000000.gpu"
    put(
        root,
        {
            f"{device}/load": f"{load_permille}\n",
            f"{device}/of_node/name": "gpu\0",
            "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
            f"{entry}/cur_freq": "612000000\n",
            f"{entry}/max_freq": "1020000000\n",
        },
    )
    (root / entry / "device").symlink_to("../..")
    (root / "sys/class/devfreq/17000000.gpu").symlink_to(f"../../../{entry}")
    nodes(root, *ORIN_NODES)


def _zones(root: Path, *zones: tuple[str, int]) -> None:
    for index, (name, milli_c) in enumerate(zones):
        zone = f"sys/class/thermal/thermal_zone{index}"
        put(
            root,
            {
                f"{zone}/type": f"{name}\n",
                f"{zone}/temp": f"{milli_c}\n",
                f"{zone}/trip_point_0_type": "critical\n",
                f"{zone}/trip_point_0_temp": "104500\n",
                f"{zone}/trip_point_1_type": "passive\n",
                f"{zone}/trip_point_1_temp": "95000\n",
            },
        )


def _ina3221(root: Path, index: int, *rails: tuple[str, int, int]) -> None:
    chip = f"sys/class/hwmon/hwmon{index}"
    put(root, {f"{chip}/name": "ina3221\n", f"{chip}/in7_label": "sum of shunt voltages\n"})
    for channel, (name, milli_v, milli_a) in enumerate(rails, 1):
        put(
            root,
            {
                f"{chip}/in{channel}_label": f"{name}\n",
                f"{chip}/in{channel}_input": f"{milli_v}\n",
                f"{chip}/curr{channel}_input": f"{milli_a}\n",
            },
        )
