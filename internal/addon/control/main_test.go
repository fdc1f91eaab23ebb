package control

import (
	"testing"

	"microk8s/internal/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }
