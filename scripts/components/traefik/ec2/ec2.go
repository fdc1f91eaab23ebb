// Package ec2 stands for AWS' client of its machines, a sixth of what Traefik would link, for
// which a cluster's ingress has no use: every call says that it is not there.
package ec2

import (
	"context"
	"errors"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

// Client knows no machine.
type Client struct{}

// NewFromConfig makes a client.
func NewFromConfig(aws.Config) *Client { return &Client{} }

// DescribeInstancesInput says which machines are asked for.
type DescribeInstancesInput struct{ InstanceIds []string }

// DescribeInstancesOutput is a page of machines.
type DescribeInstancesOutput struct{ Reservations []types.Reservation }

// DescribeInstancesPaginator goes through the pages.
type DescribeInstancesPaginator struct{}

// NewDescribeInstancesPaginator makes one.
func NewDescribeInstancesPaginator(*Client, *DescribeInstancesInput) *DescribeInstancesPaginator {
	return &DescribeInstancesPaginator{}
}

// HasMorePages says that there is a page, so that NextPage is asked and fails.
func (*DescribeInstancesPaginator) HasMorePages() bool { return true }

// NextPage fails.
func (*DescribeInstancesPaginator) NextPage(context.Context) (*DescribeInstancesOutput, error) {
	return nil, errors.New("machines of EC2 are not part of this build")
}
