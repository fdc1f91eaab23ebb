// Package suite tests the cluster agent over its wire: what clients, ours and upstream's, rely
// on, and what attackers try. It has no code of the product.
//
// Each attack names the defence of internal/defence that stops it. TestEachDefenceIsNeeded
// builds the attacks with the tag `weakened`, leaves out one defence after the other, and wants
// that attack to succeed each time.
package suite
