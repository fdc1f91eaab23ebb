package cluster

import (
	"context"

	"microk8s/internal/journal"
)

// IDs of the steps of joining, leaving and removing. Journals hold them, so none may change once
// it was in a release: a new title goes into titles, a new ID into renamed too.
const (
	StepAsk            = "ask"
	StepSaveState      = "save-state"
	StepStop           = "stop"
	StepArguments      = "arguments"
	StepCertificates   = "certificates"
	StepJoinDatastore  = "join-datastore"
	StepStart          = "start"
	StepWait           = "wait"
	StepConfirm        = "confirm"
	StepCleanUp        = "clean-up"
	StepStopKubernetes = "stop-kubernetes"
	StepLeaveDatastore = "leave-datastore"
	StepForget         = "forget"
	StepSetUp          = "set-up"
	StepUnregister     = "unregister"
	StepRevoke         = "revoke"
	StepDelete         = "delete"
	StepSetAside       = "set-aside"
	StepFill           = "fill-datastore"
	StepRemaining      = "remaining-files"
	StepRewrite        = "rewrite-membership"
)

// titles are what people read while a step runs.
var titles = map[string]string{
	StepAsk:            "Ask the cluster to admit this node",
	StepSaveState:      "Save this node's state",
	StepStop:           "Stop the services",
	StepArguments:      "Set the arguments",
	StepCertificates:   "Install the cluster's certificates",
	StepJoinDatastore:  "Join the datastore",
	StepStart:          "Start the services",
	StepWait:           "Wait for the node",
	StepConfirm:        "Confirm the join",
	StepCleanUp:        "Clean up",
	StepStopKubernetes: "Stop Kubernetes on this node",
	StepLeaveDatastore: "Leave the datastore",
	StepForget:         "Remove the cluster's files",
	StepSetUp:          "Set up a single node",
	StepUnregister:     "Remove the node from the datastore",
	StepRevoke:         "Replace the secrets that the node knew",
	StepDelete:         "Delete the Node object",
	StepSetAside:       "Set the datastore aside",
	StepFill:           "Fill the datastore from the archive",
	StepRewrite:        "Save the datastore, and make this member the only one",
	StepRemaining:      "Install addons and launch configurations",
}

// renamed is for journals of earlier versions, which stored the titles that steps had then.
var renamed = map[string]string{
	"Ask the cluster":                  StepAsk,
	"Keep what this node is":           StepSaveState,
	"Stop the services":                StepStop,
	"Set the arguments":                StepArguments,
	"Take over the certificates":       StepCertificates,
	"Join the datastore":               StepJoinDatastore,
	"Start the services":               StepStart,
	"Wait for the node":                StepWait,
	"Confirm the join":                 StepConfirm,
	"Clean up":                         StepCleanUp,
	"Stop Kubernetes on this node":     StepStopKubernetes,
	"Leave the datastore":              StepLeaveDatastore,
	"Forget the cluster":               StepForget,
	"Set the node up anew":             StepSetUp,
	"Remove it from the datastore":     StepUnregister,
	"Change the secrets that it knows": StepRevoke,
	"Delete the node":                  StepDelete,
}

// step is one of a plan; undo may be nil.
func step(id string, do, undo func(context.Context) error) journal.Step {
	return journal.Step{ID: id, Title: titles[id], Do: do, Undo: undo}
}
