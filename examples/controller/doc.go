// Command controller takes a snapshot of VMs on several hosts: an example of a
// controller that stands on package client alone.
//
// It drives each agent by itself, so that one that hangs holds up no other, and
// repeats what may have been lost. That is safe for two reasons. Each request has
// an id, made of the name of the round, the VM and the attempt, by which an agent
// knows a request that it has had already. And an operation that an agent's
// restart has cut off comes to its end at the agent, which finishes it or takes it
// back: only when it was taken back is there a next attempt, under another id. So
// a controller that was killed can be started again with the same round, and goes
// on where it was.
//
// A VM that is busy is waited for. What cannot be got over by waiting (no space, a
// role that is not enough) ends the work on that VM, and the others go on.
package main
