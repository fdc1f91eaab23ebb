package cluster

import (
	"crypto/x509/pkix"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"microk8s/internal/longtest"
	"microk8s/internal/pki"
	"microk8s/tests/lab"
	"microk8s/tests/lab/labtest"
	"microk8s/tests/snippet"
)

// TestAutomation runs the snippets of docs/automation.md: what cloud-init, Ansible, the Juju charm and
// the Cluster API providers type, and what a pipeline does. The gate has the first machine of one of them.
func TestAutomation(t *testing.T) {
	list, err := snippet.Read("../../docs/automation.md")
	if err != nil {
		t.Fatal(err)
	}
	page := map[string]string{}
	for _, s := range list {
		page[s.Name] = s.Text
	}
	t.Run("Cluster API", func(t *testing.T) {
		c := newAutomated(t, page, "n1")
		c.issueCA(t, "n1")
		c.shell(t, "n1", "capi first")
		c.waitReady(t, "n1", "n1")
		if out := c.status(t, "n1").out; !strings.Contains(out, ":2380\n") {
			t.Errorf("the datastore's port is not the chosen one:\n%s", out)
		}
		if line := c.run(t, "n1", "microk8s", "add-node", "--format", "short"); !strings.Contains(line, ":2379/") {
			t.Errorf("add-node prints %q", line)
		}
		if !longtest.Enabled() {
			return
		}
		c.more(t, "w1")
		c.shell(t, "w1", "capi worker")
		c.waitReady(t, "n1", "w1")
		c.run(t, "w1", "microk8s", "leave")
		c.run(t, "n1", "microk8s", "remove-node", "w1")
		c.more(t, "n2")
		c.shell(t, "n2", "capi join")
		c.waitReady(t, "n1", "n2")
		if line := c.run(t, "n2", "microk8s", "add-node", "--format", "short"); !strings.Contains(line, ":2379/") {
			t.Errorf("add-node prints %q", line)
		}
		c.run(t, "n1", "microk8s", "dbctl", "backup", "-o", "/root/backup")
		c.run(t, "n2", "microk8s", "leave")
		c.run(t, "n1", "microk8s", "remove-node", "n2")
		if out := c.status(t, "n2").out; !strings.Contains(out, "127.0.0.1:2380") {
			t.Errorf("the port is gone with the cluster:\n%s", out)
		}
		c.run(t, "n2", "microk8s", "join", c.ip(t, "n1")+":2379/mHOAhTAbnqhqykLKYxlzjPWEFHTWBehH")
		c.waitReady(t, "n1", "n2")
		if out := c.status(t, "n1").out; !strings.Contains(out, c.ip(t, "n1")+":2380") || strings.Contains(out, ":19001") {
			t.Errorf("after a second join:\n%s", out)
		}
	})
	if !longtest.Enabled() {
		return
	}
	t.Run("cloud-init", func(t *testing.T) {
		c := newAutomated(t, page, "n1", "n2")
		c.cloudInit(t, "n1", "cloud-init first")
		c.cloudInit(t, "n2", "cloud-init join")
		c.waitReady(t, "n1", "n2")
	})
	t.Run("Ansible", func(t *testing.T) {
		c := newAutomated(t, page, "n1", "w1")
		hosts := map[string]string{"microk8s_first": "n1", "microk8s_workers": "w1"}
		c.ansible(t, hosts)
		c.waitReady(t, "n1", "w1")
		if n := c.ansible(t, hosts); n != 0 {
			t.Errorf("a second run changes %d things", n)
		}
		eventually(t, time.Minute, func() error {
			n, err := c.node(t, "n1", "n1")
			if err != nil {
				return err
			}
			if pods := n.Status.Capacity.Pods().String(); pods != "60" {
				return fmt.Errorf("the node takes %s pods", pods)
			}
			return nil
		})
		c.shell(t, "n1", "gitops")
	})
	t.Run("Juju", func(t *testing.T) {
		c := newAutomated(t, page, "n1", "n2")
		c.shell(t, "n1", "juju first")
		c.shell(t, "n2", "juju join")
		c.waitReady(t, "n1", "n2")
		if err := c.lab.Kill(t.Context(), "n2"); err != nil {
			t.Fatal(err)
		}
		c.shell(t, "n1", "juju remove")
		c.wantNodes(t, "n1", "n1")
	})
}

// automated is a cluster that recipes set up.
type automated struct {
	*cluster
	page map[string]string
}

func newAutomated(t *testing.T, page map[string]string, hosts ...string) *automated {
	t.Helper()
	c := &automated{newCluster(t, hosts...), page}
	for _, h := range hosts {
		c.prepare(t, h)
	}
	return c
}

// prepare puts the command snap of the lab on a host.
func (c *automated) prepare(t *testing.T, host string) {
	t.Helper()
	text, err := os.ReadFile("testdata/snap")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(c.lab.Root(host), "root/bin/snap")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o755); err != nil {
		t.Fatal(err)
	}
}

// more adds a host.
func (c *automated) more(t *testing.T, host string) {
	t.Helper()
	labtest.Node(t, c.lab, host, lab.Options{DefaultRoute: true})
	c.prepare(t, host)
}

// here puts the lab's address into a text of the page.
func (c *automated) here(t *testing.T, text string) string {
	t.Helper()
	return strings.ReplaceAll(text, "10.0.0.11", c.ip(t, "n1"))
}

// runLine runs one line, or more, in a host. As in cloud-init and over ssh there is no HOME.
func (c *automated) runLine(t *testing.T, host, text string) {
	t.Helper()
	c.run(t, host, "env", "-u", "HOME", "PATH=/root/bin:/snap/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-exc", "cd /root; "+text)
}

// shell runs a snippet of shell; a line that fails ends it.
func (c *automated) shell(t *testing.T, host, name string) {
	t.Helper()
	c.runLine(t, host, c.here(t, c.page[name]))
}

// put writes a file of a host, as cloud-init and Ansible do.
func (c *automated) put(t *testing.T, host, path, content, mode string) {
	t.Helper()
	c.runIn(t, host, content, "sh", "-c", fmt.Sprintf("mkdir -p $(dirname %[1]s) && cat > %[1]s.new && chmod %[2]s %[1]s.new && mv %[1]s.new %[1]s", path, mode))
}

// tools is where a host has cloud-init and Ansible.
const tools = "/opt/automation"

// installTools puts cloud-init and Ansible, from Debian's packages, on a host.
func (c *automated) installTools(t *testing.T, host string) {
	t.Helper()
	const dir = "../../build/automation"
	if out, err := exec.CommandContext(t.Context(), "../../scripts/automation").CombinedOutput(); err != nil {
		t.Fatalf("cannot fetch cloud-init and Ansible: %v\n%s", err, out)
	}
	if err := os.CopyFS(filepath.Join(c.lab.Root(host), tools), os.DirFS(dir+"/root")); err != nil {
		t.Fatal(err)
	}
}

// tool runs one of them in a host. As at boot and over ssh there is little in the environment.
func (c *automated) tool(t *testing.T, host, script string) string {
	t.Helper()
	return c.run(t, host, "env", "-i", "LC_ALL=C.UTF-8", "PYTHONPATH="+tools+"/usr/lib/python3/dist-packages",
		"PATH=/root/bin:/snap/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"sh", "-ec", "cloud() { /usr/bin/python3 "+tools+"/usr/bin/cloud-init \"$@\"; }; playbook() { HOME=/root /usr/bin/python3 "+tools+"/usr/bin/ansible-playbook \"$@\"; }\n"+script)
}

// cloudConfig has cloud-init take the user data from a file, and do nothing else to a host than what it says.
const cloudConfig = `datasource_list: [NoCloud]
network: {config: disabled}
cloud_init_modules: [write-files]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user]
system_info: {distro: debian}
`

// cloudInit boots a host with the user data, as cloud-init's services do, in their order.
func (c *automated) cloudInit(t *testing.T, host, name string) {
	t.Helper()
	c.installTools(t, host)
	const seed = "/var/lib/cloud/seed/nocloud/"
	c.put(t, host, "/etc/cloud/cloud.cfg", cloudConfig, "0644")
	c.put(t, host, seed+"meta-data", "instance-id: i-"+host+"\nlocal-hostname: "+host+"\n", "0644")
	c.put(t, host, seed+"user-data", c.here(t, c.page[name]), "0600")
	out := c.tool(t, host, "cloud schema --config-file "+seed+"user-data; cloud init --local; cloud init; cloud modules --mode=config; cloud modules --mode=final; cloud status --long")
	if !strings.Contains(out, "status: done") {
		t.Errorf("cloud-init on %s:\n%s", host, out)
	}
}

// recap is what ansible-playbook says at its end of one host.
var recap = regexp.MustCompile(`ok=\d+ +changed=(\d+) +unreachable=0 +failed=0 `)

// ansible runs the page's playbook on each host, as the one of its group, and returns how many tasks have changed something.
func (c *automated) ansible(t *testing.T, groups map[string]string) (changed int) {
	t.Helper()
	for _, group := range slices.Sorted(maps.Keys(groups)) { // the first node is first
		host := groups[group]
		if c.try(t, host, "test", "-e", tools).code != 0 {
			c.installTools(t, host)
		}
		inventory := ""
		for other := range groups {
			inventory += "[" + other + "]\n"
			if other == group {
				inventory += host + " ansible_connection=local ansible_python_interpreter=/usr/bin/python3 ansible_become_method=su\n"
			}
		}
		c.put(t, host, "/root/hosts.ini", inventory, "0644")
		c.put(t, host, "/root/site.yaml", c.page["ansible"], "0644")
		out := c.tool(t, host, "cd /root; playbook -i hosts.ini -e first="+c.ip(t, "n1")+" -e microk8s_token=5b0d6e2c94f14aa7b9c3d18e07a2f6c1 site.yaml")
		found := recap.FindStringSubmatch(out)
		if found == nil {
			t.Fatalf("ansible-playbook on %s:\n%s", host, out)
		}
		n, err := strconv.Atoi(found[1])
		if err != nil {
			t.Fatal(err)
		}
		changed += n
	}
	return changed
}

// issueCA makes the CA that Cluster API brings.
func (c *automated) issueCA(t *testing.T, host string) {
	t.Helper()
	maker := pki.Maker{}
	key, err := maker.Key(2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := maker.Issue(pki.Request{Subject: pkix.Name{CommonName: "kubernetes"}, Days: 3650, CA: true}, key.Public(), nil, key)
	if err != nil {
		t.Fatal(err)
	}
	c.put(t, host, "/var/tmp/ca.crt", string(pki.EncodeCert(der)), "0600")
	c.put(t, host, "/var/tmp/ca.key", string(pki.EncodeKey(key)), "0600")
}
