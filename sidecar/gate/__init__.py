"""Whether a call may be made: limits, what is left of them, and who keeps the count.

`limits` reads what an operator wrote, `windows` says which period a moment belongs to, `estimate` how much a call may
consume at most, `counters` decides and settles (one owner, in the process that meters), `allowance` decides in a
process that serves, out of what it was granted. All of them are pure. `admission` is what the hop sees, `owner` is who
the others ask. Where many sidecars share their limits, `shares` says how much one leases, and `fleet` leases it.
"""
