// Package suite tests the cluster agent over its wire: what clients, ours and upstream's, rely
// on, and what attackers try. Attacks that go past the agent are here too: on the API server's gate for
// nodes, on the rights of the ingress controller, and by a cluster on a node that joins it. It has
// no code of the product.
//
// Each attack names the defence that stops it. A file of the folder mutants says how the product
// would look without that defence. TestEachDefenceIsNeeded applies the mutants to a copy of the
// sources, which it builds with `go test -overlay`, leaves out one defence after the other, and
// wants that attack to succeed each time. Nothing of it is in the product.
package suite
