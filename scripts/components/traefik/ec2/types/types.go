// Package types holds what Traefik's provider for ECS names of the module that this one replaces.
package types

// Reservation is a group of machines.
type Reservation struct{ Instances []Instance }

// Instance is a machine.
type Instance struct {
	InstanceId, PrivateIpAddress *string
	State                        *InstanceState
}

// InstanceState is the state of a machine.
type InstanceState struct{ Name InstanceStateName }

// InstanceStateName is the name of a state.
type InstanceStateName string

// InstanceStateNameRunning is the state in which a machine serves.
const InstanceStateNameRunning InstanceStateName = "running"
