// Package types holds what Traefik's provider for ECS names of the module that this one replaces.
package types

// InstanceInformation is a machine.
type InstanceInformation struct {
	InstanceId, IPAddress *string
	PingStatus            PingStatus
}

// PingStatus is the state of a machine.
type PingStatus string

// PingStatusOnline is the state in which a machine serves.
const PingStatusOnline PingStatus = "Online"

// InstanceInformationStringFilter says which machines are asked for.
type InstanceInformationStringFilter struct {
	Key    *string
	Values []string
}
