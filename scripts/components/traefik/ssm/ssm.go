// Package ssm stands for AWS' client of its Systems Manager, for which a cluster's ingress has no
// use: every call says that it is not there.
package ssm

import (
	"context"
	"errors"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ssm/types"
)

// Client knows no machine.
type Client struct{}

// NewFromConfig makes a client.
func NewFromConfig(aws.Config) *Client { return &Client{} }

// DescribeInstanceInformationInput says which machines are asked for.
type DescribeInstanceInformationInput struct {
	Filters []types.InstanceInformationStringFilter
}

// DescribeInstanceInformationOutput is a page of machines.
type DescribeInstanceInformationOutput struct {
	InstanceInformationList []types.InstanceInformation
}

// DescribeInstanceInformationPaginator goes through the pages.
type DescribeInstanceInformationPaginator struct{}

// NewDescribeInstanceInformationPaginator makes one.
func NewDescribeInstanceInformationPaginator(*Client, *DescribeInstanceInformationInput) *DescribeInstanceInformationPaginator {
	return &DescribeInstanceInformationPaginator{}
}

// HasMorePages says that there is a page, so that NextPage is asked and fails.
func (*DescribeInstanceInformationPaginator) HasMorePages() bool { return true }

// NextPage fails.
func (*DescribeInstanceInformationPaginator) NextPage(context.Context) (*DescribeInstanceInformationOutput, error) {
	return nil, errors.New("machines of AWS Systems Manager are not part of this build")
}
