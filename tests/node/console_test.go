package node

import (
	"testing"

	"microk8s/internal/longtest"
	"microk8s/tests/console"
	"microk8s/tests/lab/labtest"
)

// testConsole goes through the console in a browser; the node is Ready, and has the image of the tests.
func (n *node) testConsole(t *testing.T) {
	console.Run(t, labtest.Host{Lab: n.lab, Name: n.name}, build, longtest.Enabled())
}
