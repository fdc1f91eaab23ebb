package certs

import (
	"crypto/x509/pkix"
	_ "embed"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
)

// CSRTemplate is the text that csr.conf.template has at first. Users edit the file.
//
//go:embed csr.conf.template
var CSRTemplate []byte

const moreIPs = "#MOREIPS"

// csr is what a request configuration asks for.
type csr struct {
	subject pkix.Name
	dns     []string
	ips     []net.IP
}

// renderCSR puts the addresses in the place of the marker, as IP.n lines with n from 3 on
// and not used otherwise. Addresses that the template names itself are not repeated.
func renderCSR(template []byte, addresses []net.IP) ([]byte, error) {
	parsed, err := parseCSR(template)
	if err != nil {
		return nil, err
	}
	used := map[int]bool{}
	for line := range strings.Lines(string(template)) {
		key, _, _ := strings.Cut(line, "=")
		if n, ok := strings.CutPrefix(strings.TrimSpace(key), "IP."); ok {
			if number, err := strconv.Atoi(n); err == nil {
				used[number] = true
			}
		}
	}
	var lines []string
	n := 3
	for _, ip := range addresses {
		if slices.ContainsFunc(parsed.ips, ip.Equal) {
			continue
		}
		for used[n] {
			n++
		}
		lines = append(lines, fmt.Sprintf("IP.%d = %s", n, ip))
		n++
	}
	return []byte(strings.Replace(string(template), moreIPs+"\n", func() string {
		if len(lines) == 0 {
			return "\n"
		}
		return strings.Join(lines, "\n") + "\n"
	}(), 1)), nil
}

// parseCSR reads the sections dn and alt_names of an OpenSSL request configuration.
func parseCSR(text []byte) (csr, error) {
	var c csr
	section, number := "", 0
	for line := range strings.Lines(string(text)) {
		number++
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		if inner, ok := strings.CutPrefix(line, "["); ok {
			section = strings.TrimSpace(strings.TrimSuffix(inner, "]"))
			continue
		}
		if line == "" || section != "dn" && section != "alt_names" {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok || value == "" {
			return c, csrError(number, fmt.Sprintf("%q is not of the form NAME = VALUE", line))
		}
		if section == "dn" {
			c.setSubject(key, value)
			continue
		}
		kind, _, _ := strings.Cut(key, ".")
		switch kind {
		case "DNS":
			if strings.ContainsAny(value, " \t/:@") {
				return c, csrError(number, fmt.Sprintf("%q is not a host name", value))
			}
			c.dns = append(c.dns, value)
		case "IP":
			ip := net.ParseIP(value)
			if ip == nil {
				return c, csrError(number, fmt.Sprintf("%q is not an IP address", value))
			}
			c.ips = append(c.ips, ip)
		default:
			return c, csrError(number, fmt.Sprintf("%q is neither DNS.n nor IP.n", key))
		}
	}
	return c, nil
}

func csrError(line int, what string) error {
	return fmt.Errorf("line %d: %s; fix the line, or delete the file to start from the shipped one", line, what)
}

func (c *csr) setSubject(key, value string) {
	switch key {
	case "C":
		c.subject.Country = []string{value}
	case "ST":
		c.subject.Province = []string{value}
	case "L":
		c.subject.Locality = []string{value}
	case "O":
		c.subject.Organization = []string{value}
	case "OU":
		c.subject.OrganizationalUnit = []string{value}
	case "CN":
		c.subject.CommonName = value
	}
}
