package main

import (
	"context"
	"errors"

	"github.com/spf13/pflag"

	"github.com/cert-manager/cert-manager/internal/apis/config/webhook/validation"
	cmwebhook "github.com/cert-manager/cert-manager/internal/webhook"
	_ "github.com/cert-manager/cert-manager/internal/webhook/feature" // its gates
	logf "github.com/cert-manager/cert-manager/pkg/logs"
	utilfeature "github.com/cert-manager/cert-manager/pkg/util/feature"
	"github.com/cert-manager/cert-manager/pkg/webhook/options"
)

// webhookPart checks cert-manager's objects for the API server.
func webhookPart(flags *pflag.FlagSet) func(context.Context) error {
	c, err := options.NewWebhookConfiguration()
	if err != nil {
		return func(context.Context) error { return err }
	}
	options.AddConfigFlags(flags, c)
	return func(ctx context.Context) error {
		if wrong := validation.ValidateWebhookConfiguration(c, nil); len(wrong) > 0 {
			return wrong.ToAggregate()
		}
		err := errors.Join(utilfeature.DefaultMutableFeatureGate.SetFromMap(c.FeatureGates), logf.ValidateAndApply(&c.Logging))
		if err != nil {
			return err
		}
		s, err := cmwebhook.NewCertManagerWebhookServer(logf.FromContext(ctx), *c)
		if err != nil {
			return err
		}
		return s.Run(ctx)
	}
}
