"""Who makes things go wrong, and puts them right again."""

import asyncio
from collections.abc import Callable

from tests.simulation.hardware import Hardware
from tests.simulation.loop import Process
from tests.simulation.nats import SimClient
from tests.simulation.scenario import Fault
from tests.simulation.world import BILLING, SCHEDULERS, World

MAX_STEPS_TO_FAULT = 30
START_TO_FAULT_SECONDS = 2.0
DAEMON_BACK_SECONDS = 1.2
"""A daemon that died is started again this soon, as systemd does: what runs under it must not outlive its lease."""
SCHEDULER_DEAD_SECONDS = 3.0
SCHEDULER_STOPPED_SECONDS = 9.0
LEADER_STOPPED_SECONDS = (5.5, 9.0)
BILLING_DEAD_SECONDS = 2.0
DAEMON_STOPPED_SECONDS = 12.0
MACHINE_LOST_SECONDS = 14.0
LINE_CUT_SECONDS = 14.0
NATS_DOWN_SECONDS = 4.0
BILLING_CUT_OFF_SECONDS = 6.0
DATABASE_DOWN_SECONDS = 2.0
"""How long each lasts at most: machines, lines and daemons longer than a lease."""
CALM_SHARE = 0.75
"""Of the runs in which messages fare well once the faults are over."""
POOR_UDGPU = 45_000
"""Two windows of one GPU at the default price, and a bit."""
RICH_UDGPU = 50_000_000


class Chaos:
    """Faults of the scenario, at random times. `repair` ends all of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = world.fault_random
        self._over_at_seconds = 0.0
        self._actions: dict[Fault, Callable[[], None]] = {
            Fault.SCHEDULER_KILLED: lambda: self._kill(
                Fault.SCHEDULER_KILLED, self._random.choice(SCHEDULERS), SCHEDULER_DEAD_SECONDS
            ),
            Fault.SCHEDULER_STOPPED: lambda: self._stop(
                Fault.SCHEDULER_STOPPED, self._random.choice(SCHEDULERS), SCHEDULER_STOPPED_SECONDS
            ),
            Fault.LEADER_STOPPED: self._stop_leader,
            Fault.BILLING_KILLED: lambda: self._kill(Fault.BILLING_KILLED, BILLING, BILLING_DEAD_SECONDS),
            Fault.DAEMON_KILLED: lambda: self._at_a_machine(
                lambda machine: self._kill(Fault.DAEMON_KILLED, machine.name, DAEMON_BACK_SECONDS)
            ),
            Fault.DAEMON_STOPPED: lambda: self._at_a_machine(
                lambda machine: self._stop(Fault.DAEMON_STOPPED, machine.name, DAEMON_STOPPED_SECONDS)
            ),
            Fault.MACHINE_LOST: lambda: self._at_a_machine(self._lose_machine),
            Fault.LINE_CUT: self._cut_line,
            Fault.CONNECTION_BROKEN: self._break_connection,
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
            world.network.weather.lost_request_chance = self._random.uniform(0.01, 0.2)
            world.network.weather.lost_reply_chance = self._random.uniform(0.02, 0.3)
        if Fault.COMMIT_UNKNOWN in faults:
            world.unknown_commit_chance = self._random.uniform(0.01, 0.12)
        world.happened[Fault.POOR] += Fault.POOR in faults
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
        """Everything works again, and everybody has money.

        Half of the time what lasts ends when it would have, so that it may outlast leases. And sometimes messages go on
        being lost, late or there twice: everything must come to its end all the same.
        """
        world = self._world
        if self._random.random() < 0.5 and self._over_at_seconds > world.loop.time():
            await asyncio.sleep(self._over_at_seconds - world.loop.time())
        world.say("everything is repaired")
        if self._random.random() < CALM_SHARE:
            self._calm()
        world.stop_next_plan_seconds = 0.0
        world.when_started.clear()
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

    def _calm(self) -> None:
        world = self._world
        world.broker.weather.late_chance = world.broker.weather.twice_chance = 0.0
        world.broker.weather.lost_ack_chance = 0.0
        world.network.weather.lost_request_chance = world.network.weather.lost_reply_chance = 0.0
        world.unknown_commit_chance = 0.0

    # --- processes ----------------------------------------------------------------------------------------------------

    def _at_a_machine(self, action: Callable[[Hardware], None]) -> None:
        """At any, now; or soon after the next job has started, at its machine: there is the most to lose."""
        if self._random.random() < 0.5:
            action(self._random.choice(self._world.machines))
        else:
            seconds = self._random.uniform(0.0, START_TO_FAULT_SECONDS)
            self._world.when_started.append(lambda machine: self._world.loop.later(seconds, action, machine))

    def _later(self, most_seconds: float, action: Callable[[], object]) -> None:
        seconds = self._random.uniform(0.2, most_seconds)
        self._over_at_seconds = max(self._over_at_seconds, self._world.loop.time() + seconds)
        self._world.loop.later(seconds, action)

    def _at_a_step(self, process: Process, action: Callable[[], None]) -> None:
        """Now, or between two effects of what the process does next."""
        if self._random.random() < 0.3:
            action()
        else:
            process.at_fault = action
            process.steps_to_fault = self._random.randint(1, MAX_STEPS_TO_FAULT)

    def _kill(self, fault: Fault, name: str, back_seconds: float) -> None:
        process = self._world.processes[name]

        def die() -> None:
            self._world.happened[fault] += 1
            process.kill()
            self._later(back_seconds, lambda: self._world.restart(name))

        if process.running:
            self._at_a_step(process, die)

    def _stop(self, fault: Fault, name: str, most_seconds: float) -> None:
        process = self._world.processes[name]
        seconds = self._random.uniform(1.0, most_seconds)

        def stop() -> None:
            self._world.happened[fault] += 1
            self._world.freeze(process, seconds)

        if process.running:
            self._at_a_step(process, stop)

    def _stop_leader(self) -> None:
        """Whoever applies the next plan stops in the middle of it, for longer than its lease."""
        self._world.stop_next_plan_seconds = self._random.uniform(*LEADER_STOPPED_SECONDS)

    def _lose_machine(self, machine: Hardware) -> None:
        if not machine.powered:
            return
        self._world.say("loses power", machine.name)
        self._world.happened[Fault.MACHINE_LOST] += 1
        machine.lose_power()
        self._world.processes[machine.name].kill()

        def back() -> None:
            if not machine.powered:
                machine.start_again()
                self._world.restart(machine.name)

        self._later(MACHINE_LOST_SECONDS, back)

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
        self._world.happened[Fault.LINE_CUT] += 1

        def heal() -> None:
            if client.cut:
                self._world.say(f"the line of {client.owner} is back")
                client.heal(keep=keep)

        self._later(LINE_CUT_SECONDS, heal)

    def _break_connection(self) -> None:
        if self._world.broker.clients:
            self._world.happened[Fault.CONNECTION_BROKEN] += 1
            self._a_client().broken()

    def _nats_down(self, *, empty: bool) -> None:
        broker = self._world.broker
        if broker.up:
            self._world.say("NATS goes down")
            self._world.happened[Fault.NATS_EMPTIED if empty else Fault.NATS_DOWN] += 1
            broker.stop()

            def back() -> None:
                self._world.say("NATS is back" + (", empty" if empty else ""))
                broker.start(empty=empty)

            self._later(NATS_DOWN_SECONDS, back)

    def _cut_billing_off(self) -> None:
        pairs = {(name, BILLING) for name in SCHEDULERS if self._random.random() < 0.7}
        self._world.say("billing is cut off")
        self._world.happened[Fault.BILLING_CUT_OFF] += bool(pairs)
        self._world.network.cut |= pairs

        def heal() -> None:
            self._world.network.cut -= pairs

        self._later(BILLING_CUT_OFF_SECONDS, heal)

    # --- the database, prices, users ----------------------------------------------------------------------------------

    def _database_down(self) -> None:
        world = self._world
        world.say("the database restarts")
        world.happened[Fault.DATABASE_DOWN] += 1
        world.database_up = False
        world.database.break_all()

        def back() -> None:
            world.database_up = True

        self._later(DATABASE_DOWN_SECONDS, back)

    def _change_price(self) -> None:
        world = self._world
        machine = self._random.choice(world.machines)
        price = self._random.randint(1_000_000, 9_000_000)
        if world.market is not None and str(machine.id) in world.market.machines:
            world.say(f"now costs {price} micro-$dGPU per GPU-hour", machine.name)
            world.happened[Fault.PRICE_CHANGE] += 1
            world.processes["market"].spawn(world.market.set_price(machine.id, price))

    def _cancel(self) -> None:
        if self._world.accepted:
            self._world.happened[Fault.CANCEL] += 1
            self._world.user.spawn(self._world.cancel(self._random.choice(self._world.accepted)))
