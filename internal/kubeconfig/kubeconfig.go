// Package kubeconfig makes and reads the kubeconfig files of the product: one cluster, one
// context and one user, with the certificates inside (cli.md 6.5). Where they are and when
// they are rewritten is internal/certs' business.
package kubeconfig

import (
	"fmt"
	"net"
	"strconv"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// Names in every kubeconfig of the product.
const (
	Cluster = "microk8s-cluster"
	Context = "microk8s"
)

// Config is the content of one file. Certificates and key are PEM.
type Config struct {
	CA, Cert, Key []byte
	Server        string // URL
	User          string
}

// LocalServer is the URL of the API server, or of the proxy in front of it, on this machine.
func LocalServer(port int) string {
	return "https://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}

// Encode returns the file's text.
func (c Config) Encode() ([]byte, error) {
	cfg := clientcmdapi.NewConfig()
	cfg.Clusters[Cluster] = &clientcmdapi.Cluster{Server: c.Server, CertificateAuthorityData: c.CA}
	cfg.AuthInfos[c.User] = &clientcmdapi.AuthInfo{ClientCertificateData: c.Cert, ClientKeyData: c.Key}
	cfg.Contexts[Context] = &clientcmdapi.Context{Cluster: Cluster, AuthInfo: c.User}
	cfg.CurrentContext = Context
	data, err := clientcmd.Write(*cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot make the kubeconfig of %s: %w", c.User, err)
	}
	return data, nil
}

// Decode reads what the current context of a kubeconfig uses. Fields that it lacks are empty.
func Decode(data []byte) (Config, error) {
	cfg, err := clientcmd.Load(data)
	if err != nil {
		return Config{}, fmt.Errorf("cannot read the kubeconfig: %w", err)
	}
	var c Config
	if ctx := cfg.Contexts[cfg.CurrentContext]; ctx != nil {
		c.User = ctx.AuthInfo
		if cluster := cfg.Clusters[ctx.Cluster]; cluster != nil {
			c.CA, c.Server = cluster.CertificateAuthorityData, cluster.Server
		}
		if user := cfg.AuthInfos[ctx.AuthInfo]; user != nil {
			c.Cert, c.Key = user.ClientCertificateData, user.ClientKeyData
		}
	}
	return c, nil
}
