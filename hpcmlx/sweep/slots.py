"""Which points run at once: each gets slots of the hosts that no other has meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hpcmlx.launch.hostfile import Host


class Slots:
    """What is free on the hosts.

    Where a host does not say how many slots it has, one point runs after another.

    Attributes:
        total: slots of all hosts; 0 where one does not say.
    """

    def __init__(self, hosts: Sequence[Host]):
        """
        Args:
            hosts: in the order in which ranks fill them.
        """
        self._hosts = list(hosts)
        slots = [host.slots or 0 for host in hosts]
        self.total = sum(slots) if all(slots) else 0
        self._free = slots if self.total else [0 for _ in hosts]
        self._running = 0

    def take(self, num_ranks: int) -> dict[int, int] | None:
        """Slots for a point: index of a host -> how many of its slots.

        Returns:
            None where it has to wait. A point that needs more than there is in all gets everything,
            which is `{}`, as soon as no other runs.
        """
        if num_ranks > self.total:
            if self._running:
                return None
            self._running, self._held = 1, self._free
            self._free = [0 for _ in self._hosts]
            return {}
        if sum(self._free) < num_ranks:
            return None
        # A host with room for all of it, where there is one: then nothing crosses a link.
        whole = next((i for i, free in enumerate(self._free) if free >= num_ranks), None)
        taken = {}
        for i in range(len(self._free)) if whole is None else [whole]:
            if count := min(self._free[i], num_ranks):
                taken[i] = count
                self._free[i] -= count
                num_ranks -= count
        self._running += 1
        return taken

    def give_back(self, taken: Mapping[int, int]) -> None:
        """What `take` gave is free again."""
        self._running -= 1
        if not taken:
            self._free = self._held
        for i, count in taken.items():
            self._free[i] += count

    def hostfile(self, taken: Mapping[int, int]) -> str:
        """The host file of a point."""
        hosts = [replace(self._hosts[i], slots=count) for i, count in taken.items()]
        return "".join(map(_line, hosts or self._hosts))


def _line(host: Host) -> str:
    """A line of a host file, with what its comment says of the host."""
    slots = "" if host.slots is None else f" slots={host.slots}"
    return f"{host.name}{slots}{f'  #{host.comment}' if host.comment else ''}\n"
