// Package suite tests the cluster agent over its wire: what clients, ours and upstream's, rely
// on, and what attackers try. It has no code of the product.
//
// Each attack names the defence that stops it. A file of the folder mutants says how the agent
// would look without that defence. TestEachDefenceIsNeeded applies the mutants to a copy of the
// sources, which it builds with `go test -overlay`, leaves out one defence after the other, and
// wants that attack to succeed each time. Nothing of it is in the product.
package suite
