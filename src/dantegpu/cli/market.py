"""`dante offers` and `dante provider`."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from dantegpu.cli import output
from dantegpu.cli.errors import EXIT_NOT_FOUND, CliError, UsageProblem
from dantegpu.cli.money import Dgpu
from dantegpu.cli.session import Cli, command
from dantegpu.domain.units import MILLI_PER_UNIT, InvalidQuantity, format_bytes, parse_duration

if TYPE_CHECKING:
    from dantegpu.contracts.rest.machines import Device, Machine
    from dantegpu.sdk import Dante

_MACHINE = click.argument("machine", metavar="[MACHINE]", required=False)
_LIMIT = click.option("-n", "--limit", type=click.IntRange(1, 500), default=50, show_default=True, help="How many.")
_CURSOR = click.option("--cursor", help="Go on where the last page ended.")


@command("offers")
@click.option("--gpu", metavar="SPEC", help="Only machines that have these GPUs, such as RTX4090:2 or 24GB.")
@_LIMIT
@_CURSOR
def offers(cli: Cli, gpu: str | None, limit: int, cursor: str | None) -> None:
    """List machines for rent, the cheapest first."""
    with cli.client() as client:
        page = client.offers.list(gpu=gpu, cursor=cursor, limit=limit)

    def human() -> None:
        rows = [
            [offer.machine.id, gpus_of(offer.machine), cores_of(offer.machine),
             format_bytes(offer.machine.memory_bytes), offer.machine.region,
             output.money(offer.ask.price_udgpu_per_gpu_hour) if offer.machine.devices else "-",
             output.money(offer.ask.price_udgpu_per_cpu_hour), offer.machine.status,
             "yes" if offer.rentable else "no"]
            for offer in page.offers
        ]  # fmt: skip
        if not rows:
            output.note("nobody offers such a machine" if gpu else "nobody offers a machine")
            return
        headers = ["MACHINE", "GPUS", "CORES", "MEMORY", "REGION", "$/GPU-HOUR", "$/CORE-HOUR", "STATUS", "RENTABLE"]
        output.print_table(headers, rows, right=[2, 3, 5, 6])
        if page.next_cursor:
            output.note(f"more with --cursor {page.next_cursor}")

    cli.answer({"offers": page.offers, "next_cursor": page.next_cursor}, human)


def gpus_of(machine: "Machine") -> str:
    """`"2x RTX 4090 24GB (simulated)"`"""
    counted = Counter((device.model, device.vram_bytes, device.simulated) for device in machine.devices)
    texts = [
        f"{count}x {model} {format_bytes(vram_bytes)}{' (simulated)' if simulated else ''}"
        for (model, vram_bytes, simulated), count in counted.items()
    ]
    return ", ".join(texts) or "none"


def cores_of(machine: "Machine") -> str:
    """Whole cores."""
    return str(machine.cpu_milli // MILLI_PER_UNIT)


@command("list")
def provider_list(cli: Cli) -> None:
    """List your team's machines."""
    with cli.client() as client:
        machines = _all_machines(client)

    def human() -> None:
        rows = [
            [machine.id, machine.hostname, shown_status(machine), gpus_of(machine), cores_of(machine),
             str(machine.running_attempts), machine.sandbox, output.ago(machine.last_heartbeat_at)]
            for machine in machines
        ]  # fmt: skip
        if not rows:
            output.note("your team has no machines; `dante provider token` makes a token with which one joins")
            return
        headers = ["MACHINE", "HOST", "STATUS", "GPUS", "CORES", "RUNNING", "SANDBOX", "SEEN"]
        output.print_table(headers, rows, right=[4, 5])

    cli.answer({"machines": machines}, human)


def shown_status(machine: "Machine") -> str:
    """A quarantine shows, as it keeps work away just like a status does."""
    return f"{machine.status}, in quarantine" if machine.quarantine else machine.status


def _all_machines(client: "Dante") -> "list[Machine]":
    machines: list[Machine] = []
    cursor: str | None = None
    while True:
        page = client.machines.list(cursor=cursor)
        machines += page.machines
        cursor = page.next_cursor
        if cursor is None:
            return machines


def machine_id(client: "Dante", text: str | None) -> str:
    """The machine that is meant: an id, a host name, enough of either, or nothing when there is only one."""
    if text and text.startswith("mach_") and len(text) == len("mach_") + 26:
        return text
    machines = [machine for machine in _all_machines(client) if machine.status != "left"]
    if text is None:
        if len(machines) == 1:
            return machines[0].id
        raise UsageProblem(f"your team has {len(machines)} machines; name one (`dante provider list`)")
    found = [
        machine.id
        for machine in machines
        if machine.hostname == text or machine.id.endswith(text) or machine.id == text
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageProblem(f"{text!r} means {len(found)} machines; give the whole id")
    raise CliError(
        f"your team has no machine {text!r}; `dante provider list` lists them", code="machine-not-found",
        exit_code=EXIT_NOT_FOUND,
    )  # fmt: skip


@command("show")
@_MACHINE
def provider_show(cli: Cli, machine: str | None) -> None:
    """Show one of your machines."""
    with cli.client() as client:
        found = client.machines.get(machine_id(client, machine))
    cli.answer({"machine": found}, lambda: _print_machine(found))


def print_devices(machine: "Machine") -> None:
    """One line per GPU: what it is, what it does now, and whether it is well."""
    rows = [
        [str(device.index), device.mig_profile or device.model, format_bytes(device.vram_bytes), *_use(device),
         device.problem or ("simulated" if device.simulated else "well")]
        for device in machine.devices
    ]  # fmt: skip
    output.print_table(["GPU", "MODEL", "VRAM", "USED", "BUSY", "TEMP", "POWER", "HEALTH"], rows, right=[2, 3, 4, 5, 6])


def _use(device: "Device") -> list[str]:
    if device.vram_used_bytes is None:
        return ["-"] * 4
    celsius, watts = device.temperature_celsius or 0, device.power_watts or 0
    return [
        format_bytes(device.vram_used_bytes),
        f"{device.gpu_utilisation or 0:.0%}",
        f"{celsius:.0f} °C" if celsius else "-",
        f"{watts:.0f} W" if watts else "-",
    ]


def score_of(machine: "Machine") -> float:
    """What its GPUs (without any: its CPU) score together; 0 when nothing was measured."""
    if machine.devices:
        return sum(device.benchmark.score for device in machine.devices if device.benchmark is not None)
    return machine.benchmark.score if machine.benchmark is not None else 0.0


def _measured(machine: "Machine") -> str:
    found = machine.benchmark
    if found is None:
        return ""
    figures = (
        f"score {score_of(machine):g}; CPU {found.cpu_gflops:.0f} GFLOPS, memory {found.memory_gbps:.1f} GB/s, "
        f"disk {found.disk_write_mbps:.0f} MB/s written, {found.disk_read_mbps:.0f} MB/s read, "
        f"network {found.network_up_mbps:.0f} MB/s up, {found.network_down_mbps:.0f} MB/s down; "
        f"{output.ago(found.measured_at)}"
    )
    return f"{figures}\nproblem: {found.problem}" if found.problem else figures


def _print_machine(machine: "Machine") -> None:
    shut = machine.quarantine
    output.print_fields([
        ("id", machine.id),
        ("host", machine.hostname),
        ("in quarantine", f"until {output.local_time(shut.until)}: {shut.reason}" if shut else ""),
        ("status", f"{machine.status}, closed: {machine.closed}" if machine.closed else machine.status),
        ("GPUs", gpus_of(machine)),
        ("cores", cores_of(machine)),
        ("memory", f"{format_bytes(machine.memory_used_bytes)} of {format_bytes(machine.memory_bytes)} used"),
        ("disk", format_bytes(machine.disk_bytes)),
        ("system", f"{machine.os}, Linux {machine.kernel}" if machine.kernel else machine.os),
        ("driver", machine.driver_version),
        ("region", machine.region),
        ("sandbox", machine.sandbox),
        ("images", (", ".join(machine.allowed_images) or "yes") if "container" in machine.executors else "no"),
        ("container engine", machine.container_engine),
        ("network", ", ".join(machine.networks) or "no"),
        ("site", machine.site),
        ("not limited", ", ".join(machine.limits_missing)),
        ("measured", _measured(machine)),
        ("running", machine.running_attempts),
        ("joined", output.local_time(machine.joined_at)),
        ("last seen", output.ago(machine.last_heartbeat_at)),
    ])  # fmt: skip
    if machine.devices:
        print_devices(machine)


@command("status")
@_MACHINE
def provider_status(cli: Cli, machine: str | None) -> None:
    """Show how one of your machines is: jobs, GPUs and their health, what it was measured at, and what was earned."""
    with cli.client() as client:
        found = client.machines.get(machine_id(client, machine))
        wallet = client.wallet.get()

    def human() -> None:
        _print_machine(found)
        output.say(f"earned {output.money(wallet.earned_udgpu)} $dGPU by all machines of your team")

    cli.answer({"machine": found, "earned_udgpu": wallet.earned_udgpu}, human)


@command("price")
@_MACHINE
@click.option("--gpu-hour", type=Dgpu(), metavar="P", help="$dGPU per GPU-hour.")
@click.option("--cpu-hour", type=Dgpu(), metavar="P", help="$dGPU per core-hour, for jobs without a GPU.")
def provider_price(cli: Cli, machine: str | None, gpu_hour: int | None, cpu_hour: int | None) -> None:
    """Set what one of your machines costs. Jobs that run keep the price they were placed at."""
    if gpu_hour is None and cpu_hour is None:
        raise UsageProblem("say which price: --gpu-hour P, --cpu-hour P, or both")
    with cli.client() as client:
        ask = client.machines.set_ask(
            machine_id(client, machine), per_gpu_hour_udgpu=gpu_hour, per_cpu_hour_udgpu=cpu_hour
        )

    def human() -> None:
        output.say(f"{ask.machine_id} costs {output.money(ask.price_udgpu_per_gpu_hour)} $dGPU per GPU-hour and "
                   f"{output.money(ask.price_udgpu_per_cpu_hour)} $dGPU per core-hour")  # fmt: skip

    cli.answer({"ask": ask}, human)


def _intend(cli: Cli, machine: str | None, act: "Callable[[Dante, str], Machine]") -> None:
    with cli.client() as client:
        found = act(client, machine_id(client, machine))
    cli.answer({"machine": found}, lambda: output.say(f"{found.id} is {found.status}"))


@command("pause")
@_MACHINE
def provider_pause(cli: Cli, machine: str | None) -> None:
    """Take no new jobs; what runs goes on."""
    _intend(cli, machine, lambda client, found: client.machines.pause(found))


@command("resume")
@_MACHINE
def provider_resume(cli: Cli, machine: str | None) -> None:
    """Take jobs again."""
    _intend(cli, machine, lambda client, found: client.machines.resume(found))


@command("drain")
@_MACHINE
def provider_drain(cli: Cli, machine: str | None) -> None:
    """Finish what runs, take nothing new."""
    _intend(cli, machine, lambda client, found: client.machines.drain(found))


@command("leave")
@_MACHINE
@click.option("--yes", is_flag=True, help="Do not ask.")
def provider_leave(cli: Cli, machine: str | None, yes: bool) -> None:
    """Leave the platform for good. What still runs there is moved to other machines."""
    if not yes:
        click.confirm(f"Let {machine or 'your machine'} leave {cli.url} for good?", abort=True, err=True)
    _intend(cli, machine, lambda client, found: client.machines.leave(found))


@command("token")
@click.option("--expires", default="1h", show_default=True, metavar="D", help="How long it is good for.")
@click.option("--max-uses", type=click.IntRange(1, 10_000), default=1, show_default=True, help="For how many machines.")
def provider_token(cli: Cli, expires: str, max_uses: int) -> None:
    """Make a token with which machines join your team. It is shown only now."""
    try:
        seconds = parse_duration(expires)
    except InvalidQuantity as error:
        raise UsageProblem(f"--expires: {error}") from error
    with cli.client() as client:
        made = client.machines.create_join_token(expires_in_seconds=seconds, max_uses=max_uses)
        url = client.url

    def human() -> None:
        output.say(made.token)
        output.note(
            f"on the machine: dante provider join {url} --token ... (until {output.local_time(made.expires_at)})"
        )

    cli.answer({"join_token": made}, human)


@command("quarantines")
def admin_quarantines(cli: Cli) -> None:
    """List machines that failed job after job and get no new work for a while."""
    with cli.client() as client:
        found = client.admin.quarantines()

    def human() -> None:
        rows = [[each.machine_id, output.local_time(each.until), each.reason] for each in found]
        if rows:
            output.print_table(["MACHINE", "UNTIL", "REASON"], rows)
        else:
            output.note("no machine is in quarantine")

    cli.answer({"quarantines": found}, human)


@command("release-machine")
@click.argument("machine", metavar="MACHINE")
def admin_release(cli: Cli, machine: str) -> None:
    """End a machine's quarantine: it gets work again, and what failed before does not count any more."""
    with cli.client() as client:
        released = client.admin.release_machine(machine)

    def human() -> None:
        output.say(f"{machine} {'gets work again' if released else 'was not in quarantine'}")

    cli.answer({"released": released}, human)
