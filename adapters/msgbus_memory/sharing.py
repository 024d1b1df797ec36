"""Which member takes from which shard, and how a shard changes hands without two members having it at a time."""

from __future__ import annotations

from msgbus.contract.envelope import Priority
from msgbus_memory.state import Group, Hold, Member, Shard


def bind(group: Group) -> None:
    """Gives every member its sources afresh, after the group's queues were laid out."""
    for member in group.members:
        member.sources.clear()
    for member in group.members:
        if not member.exclusive:
            _share(member)
    for level in group.levels:
        balance(group, level)


def join(member: Member) -> None:
    """Takes a member into its group."""
    member.group.members.append(member)
    if member.exclusive:
        balance(member.group, member.level)
    else:
        _share(member)


def leave(member: Member) -> None:
    """Takes a member out of its group, after what it held went back."""
    group = member.group
    group.members.remove(member)
    for shard in group.levels.get(member.level, ()):
        if member in shard.takers:
            shard.takers.remove(member)
        if shard.heir is member:  # also of its own shard, which it was to have again
            shard.heir = None
        if shard.hold is not None and shard.hold.member is member:
            shard.hold = None
            if shard.heir is not None:
                _give(shard, shard.heir)
    member.sources.clear()
    if member.exclusive:
        group.legacy.difference_update([hold for hold in group.legacy if hold.member is member])
        balance(group, member.level)
        _wake_exclusive(group)


def balance(group: Group, level: Priority) -> None:
    """Spreads a level's shards over its exclusive members: counts differ by one at most, and few shards move.

    A draining member is given nothing and keeps what it has until it leaves.
    """
    active = [member for member in group.members if member.exclusive and member.level == level and not member.draining]
    owned: dict[Member, list[Shard]] = {member: [] for member in active}
    loose: list[Shard] = []
    for shard in group.levels.get(level, ()):
        if shard.heir is not None and shard.heir not in owned:
            shard.heir = None
            loose.append(shard)
        elif shard.heir is not None:
            owned[shard.heir].append(shard)
        elif shard.hold is None or shard.hold.draining:
            loose.append(shard)
        elif shard.hold.member in owned:
            owned[shard.hold.member].append(shard)
    if not active:
        return
    least, more = divmod(len(loose) + sum(map(len, owned.values())), len(active))
    active.sort(key=lambda member: len(owned[member]), reverse=True)
    for place, member in enumerate(active):
        while len(owned[member]) > least + (place < more):
            loose.append(owned[member].pop())
    for place, member in enumerate(active):
        for _ in range(least + (place < more) - len(owned[member])):
            _move(loose.pop(), member)


def settled(hold: Hold) -> None:
    """The last message of a draining hold was settled or went back: its shard goes to the heir."""
    group = hold.member.group
    if hold in group.legacy:
        group.legacy.remove(hold)
        if not group.legacy:
            _wake_exclusive(group)
    elif hold.shard is not None and hold.shard.hold is hold:
        hold.shard.hold = None
        if hold.shard.heir is not None:
            _give(hold.shard, hold.shard.heir)


def _share(member: Member) -> None:
    member.sources.extend(member.group.levels.get(member.level, ()))
    for shard in member.sources:
        shard.takers.append(member)


def _move(shard: Shard, member: Member) -> None:
    hold = shard.hold
    if hold is not None:
        hold.draining = True
        if shard in hold.member.sources:
            hold.member.sources.remove(shard)
        if hold.member in shard.takers:
            shard.takers.remove(hold.member)
    if hold is None or not hold.unsettled:
        _give(shard, member)
    else:
        shard.heir = member


def _give(shard: Shard, member: Member) -> None:
    shard.hold = Hold(member, shard)
    shard.heir = None
    shard.takers.append(member)
    member.sources.append(shard)
    member.wake()


def _wake_exclusive(group: Group) -> None:
    for member in group.members:
        if member.exclusive:
            member.wake()
