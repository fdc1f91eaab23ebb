// Package node tests one real node in the lab: real containers behind real services, power
// loss, stop and start, reset. It needs root and what `make build` made.
package node
