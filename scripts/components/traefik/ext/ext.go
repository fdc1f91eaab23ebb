// Package ext has the fields that an edition of Traefik may add to its configuration: none here. It is a module
// of its own in Traefik's repository, which its go.mod takes from there, and which no proxy serves.
package ext

// HTTP is part of the configuration of HTTP.
type HTTP struct{}

// Router is part of the configuration of a router.
type Router struct{}
