package cis

import (
	"os"
	"path/filepath"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/apis/apiserver"
	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"k8s.io/apiserver/pkg/apis/apiserver/validation"
	"k8s.io/apiserver/pkg/audit/policy"
	authenticationcel "k8s.io/apiserver/pkg/authentication/cel"
	"k8s.io/apiserver/pkg/cel/environment"
	"k8s.io/pod-security-admission/admission/api/load"
	podsecurity "k8s.io/pod-security-admission/admission/api/validation"
)

// TestShippedFiles reads the files that the default arguments name as the API server does at its
// start: one that it refuses would keep every new node from starting.
func TestShippedFiles(t *testing.T) {
	const dir = "../../snap/local/default-args"
	if _, err := policy.LoadPolicyFromFile(filepath.Join(dir, "audit-policy.yaml")); err != nil {
		t.Error(err)
	}
	pods, err := load.LoadFromFile(filepath.Join(dir, "pod-security.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if errs := podsecurity.ValidatePodSecurityConfiguration(pods); len(errs) > 0 {
		t.Error(errs.ToAggregate())
	}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{apiserver.AddToScheme, apiserverv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := admission.ReadAdmissionConfiguration([]string{"PodSecurity", "EventRateLimit"}, filepath.Join(dir, "admission-control-config-file.yaml"), scheme); err != nil {
		t.Error(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "authentication-config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var auth apiserver.AuthenticationConfiguration
	if err := runtime.DecodeInto(serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDecoder(), data, &auth); err != nil {
		t.Fatal(err)
	}
	compiler := authenticationcel.NewCompiler(environment.MustBaseEnvSet(environment.DefaultCompatibilityVersion()))
	if errs := validation.ValidateAuthenticationConfiguration(compiler, &auth, nil); len(errs) > 0 {
		t.Error(errs.ToAggregate())
	}
}
