// Package cluster tests clusters of real nodes: hosts of the lab, joined by the printed lines,
// then killed, frozen, cut off, left and removed, and commands killed at every step that they
// have.
package cluster
