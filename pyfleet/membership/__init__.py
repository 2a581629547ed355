"""P2: who is in. Pure state machines (roster, health, election, topology), and one asyncio service around them.

roster    whom we know and whom to connect to          events and time in, actions out, no sockets, no clock
health    who is alive, and how far away
election  which view comes next, and who leads it
ballots   the votes about one next view
topology  what the nodes can do, what lies between them, in which order they form a ring
messages  what nodes say to each other                 schema and limits
channel   a proven, sealed control connection          asyncio
service   the one loop that ties these together; a thread of a script, or of the agent that a launcher starts
agent     that agent, and how the ranks of its machine ask it
"""
