"""Who makes things go wrong, and puts them right again."""

import asyncio
from collections.abc import Callable

from tests.simulation.loop import Process
from tests.simulation.nats import SimClient
from tests.simulation.scenario import Fault
from tests.simulation.world import BILLING, SCHEDULERS, World

MAX_STEPS_TO_FAULT = 60
DAEMON_BACK_SECONDS = 2.0
"""A daemon that died is started again this soon, as systemd does: what runs under it must not outlive its lease."""
POOR_UDGPU = 45_000
"""Two windows of one GPU at the default price, and a bit."""
RICH_UDGPU = 50_000_000


class Chaos:
    """Faults of the scenario, at random times. `repair` ends all of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = world.fault_random
        self._actions: dict[Fault, Callable[[], None]] = {
            Fault.SCHEDULER_KILLED: lambda: self._kill(self._random.choice(SCHEDULERS), 4.0),
            Fault.SCHEDULER_STOPPED: lambda: self._stop(self._random.choice(SCHEDULERS), 14.0),
            Fault.LEADER_STOPPED: self._stop_leader,
            Fault.BILLING_KILLED: lambda: self._kill(BILLING, 3.0),
            Fault.DAEMON_KILLED: lambda: self._kill(self._a_machine(), DAEMON_BACK_SECONDS),
            Fault.DAEMON_STOPPED: lambda: self._stop(self._a_machine(), 20.0),
            Fault.MACHINE_LOST: self._lose_machine,
            Fault.LINE_CUT: self._cut_line,
            Fault.CONNECTION_BROKEN: lambda: self._a_client().broken(),
            Fault.NATS_DOWN: lambda: self._nats_down(empty=False),
            Fault.NATS_EMPTIED: lambda: self._nats_down(empty=True),
            Fault.DATABASE_DOWN: self._database_down,
            Fault.BILLING_CUT_OFF: self._cut_billing_off,
            Fault.PRICE_CHANGE: self._change_price,
            Fault.CANCEL: self._cancel,
        }

    async def begin(self) -> None:
        """What holds for the whole run: the weather, and the first money."""
        world, faults = self._world, self._world.scenario.faults
        if Fault.MESSAGES_LATE in faults:
            world.broker.weather.late_chance = self._random.uniform(0.02, 0.3)
            world.broker.weather.late_seconds = self._random.choice((0.5, 3.0, 9.0))
        if Fault.MESSAGES_TWICE in faults:
            world.broker.weather.twice_chance = self._random.uniform(0.05, 0.4)
        if Fault.ACKS_LOST in faults:
            world.broker.weather.lost_ack_chance = self._random.uniform(0.02, 0.3)
        if Fault.CALLS_LOST in faults:
            world.network.weather.lost_request_chance = self._random.uniform(0.01, 0.15)
            world.network.weather.lost_reply_chance = self._random.uniform(0.01, 0.15)
        if Fault.COMMIT_UNKNOWN in faults:
            world.unknown_commit_chance = self._random.uniform(0.005, 0.08)
        for team in world.teams:
            await world.credit(team, POOR_UDGPU if Fault.POOR in faults else RICH_UDGPU)

    async def run(self) -> None:
        """Until the chaos is over."""
        world = self._world
        actions = [action for fault, action in self._actions.items() if fault in world.scenario.faults]
        while world.loop.time() < world.scenario.chaos_seconds and not world.stopped:
            await asyncio.sleep(self._random.expovariate(1 / world.scenario.fault_pause_seconds))
            if actions and world.loop.time() < world.scenario.chaos_seconds:
                self._random.choice(actions)()
            if Fault.POOR in world.scenario.faults and self._random.random() < 0.1:
                world.user.spawn(world.credit(self._random.choice(world.teams), POOR_UDGPU))

    async def repair(self) -> None:
        """Everything works again from now on, and everybody has money."""
        world = self._world
        world.say("everything is repaired")
        world.broker.weather.late_chance = world.broker.weather.twice_chance = 0.0
        world.broker.weather.lost_ack_chance = 0.0
        world.network.weather.lost_request_chance = world.network.weather.lost_reply_chance = 0.0
        world.unknown_commit_chance = world.stop_next_plan_seconds = 0.0
        world.network.cut.clear()
        world.database_up = True
        for machine in world.machines:
            if not machine.powered:
                machine.start_again()
        for process in list(world.processes.values()):
            process.steps_to_fault = None
            world.restart(process.name)
        for client in list(world.broker.clients):
            if client.cut:
                client.heal(keep=True)
        for team in world.teams:
            await world.credit(team, RICH_UDGPU)

    # --- processes ----------------------------------------------------------------------------------------------------

    def _a_machine(self) -> str:
        return self._random.choice(self._world.machines).name

    def _later(self, most_seconds: float, action: Callable[[], object]) -> None:
        self._world.loop.later(self._random.uniform(0.2, most_seconds), action)

    def _at_a_step(self, process: Process, action: Callable[[], None]) -> None:
        """Now, or between two effects of what the process does next."""
        if self._random.random() < 0.3:
            action()
        else:
            process.at_fault = action
            process.steps_to_fault = self._random.randint(1, MAX_STEPS_TO_FAULT)

    def _kill(self, name: str, back_seconds: float) -> None:
        process = self._world.processes[name]

        def die() -> None:
            process.kill()
            self._later(back_seconds, lambda: self._world.restart(name))

        if process.running:
            self._at_a_step(process, die)

    def _stop(self, name: str, most_seconds: float) -> None:
        process = self._world.processes[name]
        seconds = self._random.uniform(1.0, most_seconds)
        if process.running:
            self._at_a_step(process, lambda: self._world.freeze(process, seconds))

    def _stop_leader(self) -> None:
        """Whoever applies the next plan stops in the middle of it, for longer than its lease."""
        self._world.stop_next_plan_seconds = self._random.uniform(5.5, 12.0)

    def _lose_machine(self) -> None:
        machine = self._random.choice(self._world.machines)
        if not machine.powered:
            return
        self._world.say("loses power", machine.name)
        machine.lose_power()
        self._world.processes[machine.name].kill()

        def back() -> None:
            if not machine.powered:
                machine.start_again()
                self._world.restart(machine.name)

        self._later(25.0, back)

    # --- network ------------------------------------------------------------------------------------------------------

    def _a_client(self) -> SimClient:
        return self._random.choice(self._world.broker.clients)

    def _cut_line(self) -> None:
        if not self._world.broker.clients:
            return
        client = self._a_client()
        client.cut = True
        keep = self._random.random() < 0.6
        self._world.say(f"the line of {client.owner} is cut")

        def heal() -> None:
            if client.cut:
                self._world.say(f"the line of {client.owner} is back")
                client.heal(keep=keep)

        self._later(22.0, heal)

    def _nats_down(self, *, empty: bool) -> None:
        broker = self._world.broker
        if broker.up:
            self._world.say("NATS goes down")
            broker.stop()

            def back() -> None:
                self._world.say("NATS is back" + (", empty" if empty else ""))
                broker.start(empty=empty)

            self._later(6.0, back)

    def _cut_billing_off(self) -> None:
        pairs = {(name, BILLING) for name in SCHEDULERS if self._random.random() < 0.7}
        self._world.say("billing is cut off")
        self._world.network.cut |= pairs

        def heal() -> None:
            self._world.network.cut -= pairs

        self._later(10.0, heal)

    # --- the database, prices, users ----------------------------------------------------------------------------------

    def _database_down(self) -> None:
        world = self._world
        world.say("the database restarts")
        world.database_up = False
        world.database.break_all()

        def back() -> None:
            world.database_up = True

        self._later(3.0, back)

    def _change_price(self) -> None:
        world = self._world
        machine = self._random.choice(world.machines)
        price = self._random.randint(1_000_000, 9_000_000)
        if world.market is not None and str(machine.id) in world.market.machines:
            world.say(f"now costs {price} micro-$dGPU per GPU-hour", machine.name)
            world.processes["market"].spawn(world.market.set_price(machine.id, price))

    def _cancel(self) -> None:
        if self._world.accepted:
            self._world.user.spawn(self._world.cancel(self._random.choice(self._world.accepted)))
